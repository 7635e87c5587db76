// Threads that compute a step together, and do not wait for one that the system has put aside.
//
// All of them run the same code, and share the passes of its loops: each takes passes until none are left, its own first.
// What another has taken, and not ended after longer than it should take, is then done once more. A barrier would wait for
// the slowest thread, hundreds of times in a step, and on cores that others want as well one is always slow. (Threads help
// each other so in wait-free algorithms: Herlihy, "Wait-free synchronization", 1991. MapReduce's backup tasks are such, too.)
//
// So a pass may be done twice, and the second time at any later moment of the call: it must write each byte once, with a
// value that does not depend on who writes it, and what it reads and writes must be left as it is until no thread can be
// at it any more (softprompt_begin_stage).

#ifndef SOFTPROMPT_TEAM_H
#define SOFTPROMPT_TEAM_H

#include "native.h"

#include <stdatomic.h>

enum { MAX_PARTS = 64, CACHE_LINE = 64 };

static inline size_t whole_lines(size_t bytes) { return (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE; }

// Alone on its cache line.
typedef struct {
    _Alignas(CACHE_LINE) _Atomic int64_t value;
} Line;

// A loop's passes, in parts of one or more. Of each part a bit, when it is done; and for each thread, how many of its
// parts are taken.
typedef struct {
    _Alignas(CACHE_LINE) _Atomic uint64_t done;
    Line taken[];
} Loop;

typedef struct {
    int64_t num_loops;  // at most
    int num_threads;    // at most
    Line *stages;       // of each thread
    char *loops;
} Team;

// Of a loop that is shared, what this thread is at.
typedef struct {
    int64_t pass;  // the one to do
    int64_t stop, passes, parts, part;
    int64_t begun, longest;  // nanoseconds: when this part was, and of the longest that this thread did
    Loop *loop;
} Share;

// Passes 0 to `passes` of a loop that takes so many multiplications: few of them are left to one thread. To be run as
//
//     for (Share s = softprompt_share(passes, work); softprompt_next(&s);) { … s.pass … }
//
// by all threads of a team, to its end; what the passes wrote is there when it ends.
Share softprompt_share(int64_t passes, int64_t work);

int softprompt_take_part(Share *share);

static inline int softprompt_next(Share *share) { return ++share->pass < share->stop || softprompt_take_part(share); }

// Begins stage 1, 2, … of what this team does, once no thread is `ahead` stages behind: what those used may be used anew.
void softprompt_begin_stage(int64_t stage, int64_t ahead);

// Memory of this thread, kept from call to call and as large as the largest was: what is new costs a fault for each of its
// pages. NULL where it was refused.
typedef struct {
    void *memory;
    size_t size;
} Kept;

void *softprompt_keep(Kept *kept, size_t bytes);

// Threads of the team that this one is in.
int softprompt_num_threads(void);

// Returns 0, or 1 where memory was refused. To be joined and left by each of its threads.
int softprompt_make_team(Team *team, int num_threads, int64_t num_loops);
void softprompt_join(Team *team);
void softprompt_leave(void);

// What functions do that are called with a number of threads, when those of a team call them with 0: makes a team of so
// many, or of one for little work, and has it make `call`, which shares at most `num_loops` loops. Returns from the function
// with 0, or 1 where a thread's call did.
#define TOGETHER(num_threads, work, num_loops, call)                                                \
    do {                                                                                            \
        Team team_;                                                                                 \
        if (softprompt_make_team(&team_, (work) > PARALLEL_WORK ? (num_threads) : 1, num_loops)) return 1; \
        int failed_ = 0;                                                                            \
        _Pragma("omp parallel num_threads(team_.num_threads) reduction(| : failed_)")               \
        {                                                                                           \
            softprompt_join(&team_);                                                                \
            failed_ |= (call);                                                                      \
            softprompt_leave();                                                                     \
        }                                                                                           \
        return failed_;                                                                             \
    } while (0)

#endif

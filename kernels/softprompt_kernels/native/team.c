// How threads share loops, see team.h.

#include "team.h"

#include <omp.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

// How much longer than the longest that this thread did itself a part may take, before it is done once more.
static const int64_t PATIENCE_NS = 3000;

// What this thread is to its team.
static _Thread_local struct {
    Team *team;
    int thread, num_threads;
    int64_t num_loops;  // that it has begun
} member;

// For tests: is called before each part, if it is set.
void (*softprompt_before_part)(int thread, int64_t loop, int64_t part);

void *softprompt_keep(Kept *kept, size_t bytes) {
    if (bytes > kept->size) {
        free(kept->memory);
        kept->size = whole_lines(bytes);
        kept->memory = aligned_alloc(CACHE_LINE, kept->size);
        if (!kept->memory) kept->size = 0;
    }
    return kept->memory;
}

int softprompt_make_team(Team *team, int num_threads, int64_t num_loops) {
    static _Thread_local Kept kept;
    const size_t loop = sizeof(Loop) + (size_t)num_threads * sizeof(Line);
    char *memory = softprompt_keep(&kept, num_threads * sizeof(Line) + num_loops * loop);
    if (!memory) return 1;
    *team = (Team){num_loops, num_threads, (Line *)memory, memory + num_threads * sizeof(Line)};
    // A thread that has not come yet is in nobody's way.
    for (int i = 0; i < num_threads; i++) atomic_init(&team->stages[i].value, INT64_MAX);
    memset(team->loops, 0, num_loops * loop);
    return 0;
}

void softprompt_join(Team *team) {
    member.team = team;
    member.thread = omp_get_thread_num();
    member.num_threads = omp_get_num_threads();
    member.num_loops = 0;
}

int softprompt_num_threads(void) { return member.num_threads; }

void softprompt_leave(void) {
    atomic_store(&member.team->stages[member.thread].value, INT64_MAX);
    member.team = NULL;
}

void softprompt_begin_stage(int64_t stage, int64_t ahead) {
    Line *stages = member.team->stages;
    atomic_store(&stages[member.thread].value, stage);
    for (int i = 0; i < member.num_threads; i++)
        while (atomic_load(&stages[i].value) <= stage - ahead) sched_yield();
}

static inline int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000 + time.tv_nsec;
}

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

Share softprompt_share(int64_t passes, int64_t work) {
    Team *team = member.team;
    if (member.num_loops >= team->num_loops) abort();  // its caller has counted wrong
    const size_t size = sizeof(Loop) + (size_t)team->num_threads * sizeof(Line);
    const int64_t most = work > PARALLEL_WORK ? MAX_PARTS : 1;
    return (Share){.pass = -1,
                   .passes = passes,
                   .parts = passes < most ? passes : most,
                   .part = -1,
                   .loop = (Loop *)(team->loops + size * member.num_loops++)};
}

static inline uint64_t bit(int64_t part) { return (uint64_t)1 << part; }

static inline uint64_t all_parts(const Share *share) { return share->parts == 64 ? ~(uint64_t)0 : bit(share->parts) - 1; }

// A part that nobody has taken, this thread's own first; -1: none.
static int64_t take(const Share *share) {
    const int count = member.num_threads;
    for (int i = 0; i < count; i++) {
        const int thread = (member.thread + i) % count;
        const int64_t first = share->parts * thread / count, stop = share->parts * (thread + 1) / count;
        _Atomic int64_t *taken = &share->loop->taken[thread].value;
        if (atomic_load_explicit(taken, memory_order_relaxed) >= stop - first) continue;
        const int64_t part = first + atomic_fetch_add(taken, 1);
        if (part < stop) return part;
    }
    return -1;
}

// Waits until all parts are done, and answers with -1; or with one that takes its thread too long.
static int64_t await(const Share *share) {
    const uint64_t all = all_parts(share);
    const int64_t patience = PATIENCE_NS + share->longest;
    int64_t since = 0;
    for (int64_t turn = 0;; turn++) {
        const uint64_t left = all & ~atomic_load(&share->loop->done);
        if (!left) return -1;
        relax();
        if (turn % 32) continue;
        const int64_t time = now();
        if (!since) since = time;
        if (time - since > patience) return __builtin_ctzll(left);
    }
}

int softprompt_take_part(Share *share) {
    const int alone = member.num_threads == 1;
    if (share->part >= 0) {
        atomic_fetch_or(&share->loop->done, bit(share->part));
        const int64_t took = alone ? 0 : now() - share->begun;
        if (took > share->longest) share->longest = took;
    }
    // Who comes late finds it done.
    if (atomic_load(&share->loop->done) == all_parts(share)) return 0;
    share->part = take(share);
    if (share->part < 0) share->part = await(share);
    if (share->part < 0) return 0;
    if (!alone) share->begun = now();
    if (softprompt_before_part) softprompt_before_part(member.thread, member.num_loops - 1, share->part);
    share->pass = share->passes * share->part / share->parts;
    share->stop = share->passes * (share->part + 1) / share->parts;
    return 1;
}

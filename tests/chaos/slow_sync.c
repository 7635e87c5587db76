/* A disk that takes its time: fsync and fdatasync wait before they do what they are asked for.
 *
 * Preloaded into a store. The file that SLOW_SYNC names holds how long, in microseconds, and is read at every call.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void wait_for_the_disk(void) {
    const char *path = getenv("SLOW_SYNC");
    FILE *file = path ? fopen(path, "r") : NULL;
    unsigned us = 0;
    if (!file) return;
    if (fscanf(file, "%u", &us) == 1 && us) usleep(us);
    fclose(file);
}

int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    wait_for_the_disk();
    return real(fd);
}

int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    wait_for_the_disk();
    return real(fd);
}

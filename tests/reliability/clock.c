/* Moves the time of day of one process by the seconds in a file, which may change at any time: preloaded by clocks.py.

   The file, named by TETHER_CLOCK_FILE, holds one 64-bit integer. Monotonic clocks are left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static char mapped_path[4096];
static volatile int64_t *mapped;

/* A forked process may be told another file, so that the name is looked at each time. */
static int64_t offset_seconds(void) {
    const char *path = getenv("TETHER_CLOCK_FILE");
    if (path == NULL || strlen(path) >= sizeof mapped_path) return 0;
    if (mapped == NULL || strcmp(path, mapped_path) != 0) {
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0) return 0;
        void *place = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
        close(file);
        if (place == MAP_FAILED) return 0;
        strcpy(mapped_path, path);
        mapped = place;
    }
    return *mapped;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (real == NULL) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += offset_seconds();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &precise) != 0) return -1;
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *place) {
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now) != 0) return (time_t)-1;
    if (place != NULL) *place = now.tv_sec;
    return now.tv_sec;
}

/* A libc that fails calls on files when it is told to. Compiled by the tests, loaded with LD_PRELOAD.
 *
 * Knows calls, paths and one order at a time. Must not know what the files are.
 *
 * FAILING_DISK_ORDER names a file. While it is there, it holds one order:
 *
 *     CALL TEXT NTH TIMES FORM ERROR
 *
 * CALL   read, sync (fsync, fdatasync), write, change (open for writing, rename, mkdir, unlink), or all:
 *        any of the last three
 * TEXT   only files whose path holds it
 * NTH    the first call that is hit, counted from 1 and from the moment the order is found
 * TIMES  how many calls are hit from there on; 0: all
 * FORM   fail: the call does nothing and fails. torn: a write writes half, and the next one fails.
 *        lie: the call does nothing and succeeds. hang: the call waits until the order is withdrawn.
 * ERROR  the errno
 *
 * For every call that is hit a line is added to the file FAILING_DISK_ORDER.done: the call, how much of
 * the file was synced before, in bytes, and its path. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum { FILES = 4096, LINE = 256 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int has_order;
static char call_wanted[16], text[128], form[16];
static long nth, times, error_number, seen;
/* By file descriptor; beyond the table nothing is known, and 0 is said. */
static long long synced_bytes[FILES];

enum verdict { PASS, FAIL, TORN, LIE };

static const char *order_path(void) {
    static const char *path;
    if (!path) path = getenv("FAILING_DISK_ORDER");
    return path;
}

/* The order, if there is one. A new one begins to count anew. */
static int read_order(void) {
    const char *path = order_path();
    if (!path) return 0;
    if (syscall(SYS_faccessat, AT_FDCWD, path, F_OK) != 0) return has_order = 0;
    if (has_order) return 1;
    char line[LINE] = {0};
    int file = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    if (file < 0) return 0;
    ssize_t length = syscall(SYS_read, file, line, LINE - 1);
    syscall(SYS_close, file);
    if (length <= 0) return 0;
    seen = 0;
    return has_order = sscanf(line, "%15s %127s %ld %ld %15s %ld", call_wanted, text, &nth, &times,
                              form, &error_number) == 6;
}

static void note(const char *call, const char *path, long long synced) {
    char name[PATH_MAX], line[PATH_MAX + 64];
    snprintf(name, sizeof name, "%s.done", order_path());
    int length = snprintf(line, sizeof line, "%s %lld %s\n", call, synced, path);
    int file = syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (file < 0) return;
    syscall(SYS_write, file, line, length);
    syscall(SYS_close, file);
}

static enum verdict judge(const char *call, const char *path, int file) {
    int before = errno;
    enum verdict verdict = PASS;
    pthread_mutex_lock(&lock);
    int is_wanted = read_order() && (!strcmp(call_wanted, call) ||
                                     (!strcmp(call_wanted, "all") && strcmp(call, "read")));
    if (is_wanted && strstr(path, text) && nth <= ++seen && (times == 0 || seen < nth + times)) {
        verdict = !strcmp(form, "lie") ? LIE : FAIL;
        if (!strcmp(form, "torn") && seen == nth) verdict = TORN;
        note(call, path, 0 <= file && file < FILES ? synced_bytes[file] : 0);
    }
    int hangs = verdict != PASS && !strcmp(form, "hang");
    pthread_mutex_unlock(&lock);
    if (hangs) {
        const struct timespec moment = {.tv_nsec = 10 * 1000 * 1000};
        while (syscall(SYS_faccessat, AT_FDCWD, order_path(), F_OK) == 0) nanosleep(&moment, NULL);
        verdict = PASS;
    }
    errno = before;
    return verdict;
}

static enum verdict judge_file(const char *call, int file) {
    int before = errno;
    char name[64], path[PATH_MAX];
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, name, path, sizeof path - 1);
    errno = before;
    if (length <= 0 || path[0] != '/') return PASS;
    path[length] = 0;
    return judge(call, path, file);
}

static int fail(void) {
    errno = (int)error_number;
    return -1;
}

static int sync_file(int file, long number) {
    switch (judge_file("sync", file)) {
    case FAIL:
    case TORN:
        return fail();
    case LIE:
        return 0;
    case PASS:
        break;
    }
    struct stat found;
    /* Measured before: what is written meanwhile need not be synced. */
    int is_known = 0 <= file && file < FILES && fstat(file, &found) == 0;
    int result = (int)syscall(number, file);
    if (result == 0 && is_known) {
        pthread_mutex_lock(&lock);
        synced_bytes[file] = found.st_size;
        pthread_mutex_unlock(&lock);
    }
    return result;
}

int fsync(int file) { return sync_file(file, SYS_fsync); }

int fdatasync(int file) { return sync_file(file, SYS_fdatasync); }

ssize_t write(int file, const void *bytes, size_t count) {
    switch (judge_file("write", file)) {
    case FAIL:
        return fail();
    case TORN:
        return syscall(SYS_write, file, bytes, 1 < count ? count / 2 : count);
    case LIE:
        return (ssize_t)count;
    case PASS:
        break;
    }
    return syscall(SYS_write, file, bytes, count);
}

ssize_t read(int file, void *bytes, size_t count) {
    if (judge_file("read", file) != PASS) return fail();
    return syscall(SYS_read, file, bytes, count);
}

ssize_t pread64(int file, void *bytes, size_t count, off64_t from) {
    if (judge_file("read", file) != PASS) return fail();
    return syscall(SYS_pread64, file, bytes, count, from);
}

ssize_t pread(int file, void *bytes, size_t count, off_t from) {
    return pread64(file, bytes, count, from);
}

#undef fread_unlocked /* which may be a macro */
size_t fread_unlocked(void *bytes, size_t size, size_t count, FILE *file) {
    static size_t (*real)(void *, size_t, size_t, FILE *);
    if (judge_file("read", fileno(file)) != PASS) {
        fail();
        return 0;
    }
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "fread_unlocked");
    return real(bytes, size, count, file);
}

static int open_file(int folder, const char *path, int flags, mode_t mode) {
    if ((flags & O_ACCMODE) != O_RDONLY && judge("change", path, -1) != PASS) return fail();
    int file = (int)syscall(SYS_openat, folder, path, flags, mode);
    if (0 <= file && file < FILES) {
        pthread_mutex_lock(&lock);
        synced_bytes[file] = 0;
        pthread_mutex_unlock(&lock);
    }
    return file;
}

static mode_t mode_of(int flags, va_list rest) {
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

#define OPEN(name)                                                                                  \
    int name(const char *path, int flags, ...) {                                                    \
        va_list rest;                                                                               \
        va_start(rest, flags);                                                                      \
        mode_t mode = mode_of(flags, rest);                                                         \
        va_end(rest);                                                                               \
        return open_file(AT_FDCWD, path, flags, mode);                                              \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                \
    int name(int folder, const char *path, int flags, ...) {                                        \
        va_list rest;                                                                               \
        va_start(rest, flags);                                                                      \
        mode_t mode = mode_of(flags, rest);                                                         \
        va_end(rest);                                                                               \
        return open_file(folder, path, flags, mode);                                                \
    }
OPENAT(openat)
OPENAT(openat64)

int rename(const char *from, const char *to) {
    if (judge("change", to, -1) != PASS) return fail();
    return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int mkdir(const char *path, mode_t mode) {
    if (judge("change", path, -1) != PASS) return fail();
    return (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}

int unlink(const char *path) {
    if (judge("change", path, -1) != PASS) return fail();
    return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

// What a disk would still hold if the power went now: a library to load before libc, by LD_PRELOAD.
//
// Keeps a journal of what happens to files below one folder: which names come and go, and up to where
// each file and each folder has been synced. The journal is outside of that folder, and it survives
// SIGKILL. After the kill, a test takes away what was not synced (tests/src/power_cut.rs).
// Knows system calls and paths. Must not know what is in the files.
//
// Environment:
//   POWER_LOSS_FOLDER   the folder that is watched, absolute
//   POWER_LOSS_JOURNAL  the journal: one line an event, fields separated by tabs
//   POWER_LOSS_GRAVES   a folder on the same file system where deleted files are kept, by inode number:
//                       as long as the folder that they were in is not synced, they may come back
//   POWER_LOSS_SWALLOW  if set: syncs of files whose name ends like this do nothing and say that they did
//   POWER_LOSS_KILL_AT  if set: the process is killed just before its n-th change to the folder
//
// A change is written down after it was made: one that was cut off by SIGKILL in between counts as one
// that never became durable, which is the weaker assumption. Lengths are enough to say what of a file is
// synced because RocksDB, and the gateway, only ever append to a file or replace it as a whole.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define LIBC(name) ((__typeof__(&name))libc_function(#name))
#define LINE_BYTES (2 * PATH_MAX + 64)

static void *libc_function(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (found == NULL) {
        abort();
    }
    return found;
}

static int is_watched(const char *path) {
    const char *folder = getenv("POWER_LOSS_FOLDER");
    size_t length = folder == NULL ? 0 : strlen(folder);
    return 0 < length && strncmp(path, folder, length) == 0 &&
           (path[length] == '/' || path[length] == '\0');
}

// The absolute path of a name as it was given to openat and its like; empty if it cannot be told.
static void absolute(int folder, const char *name, char *path) {
    char link[64], base[PATH_MAX];
    path[0] = '\0';
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    if (folder == AT_FDCWD) {
        if (getcwd(base, sizeof base) == NULL) {
            return;
        }
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) {
            return;
        }
        base[length] = '\0';
    }
    if (strlen(base) + strlen(name) + 2 <= PATH_MAX) {
        strcpy(path, base);
        strcat(path, "/");
        strcat(path, name);
    }
}

static int path_of(int file, char *path) {
    int saved = errno;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = '\0';
    errno = saved;
    return is_watched(path);
}

static void note(const char *format, ...) {
    static atomic_int journal = -1;
    int saved = errno;
    if (journal < 0) {
        int opened = LIBC(open)(getenv("POWER_LOSS_JOURNAL"),
                                O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (opened < 0) {
            abort();
        }
        journal = opened;
    }
    char line[LINE_BYTES];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (length <= 0 || (int)sizeof line <= length ||
        LIBC(write)(journal, line, (size_t)length) != length) {
        abort();
    }
    errno = saved;
}

// Called before each change.
static void about_to_change(void) {
    static atomic_long changes = 0;
    const char *last = getenv("POWER_LOSS_KILL_AT");
    if (last != NULL && atomic_fetch_add(&changes, 1) + 1 == atol(last)) {
        kill(getpid(), SIGKILL);
        for (;;) {
            pause();
        }
    }
}

static void bury(const char *path) {
    int saved = errno;
    struct stat status;
    char grave[PATH_MAX];
    if (lstat(path, &status) == 0 && S_ISREG(status.st_mode)) {
        snprintf(grave, sizeof grave, "%s/%lu", getenv("POWER_LOSS_GRAVES"),
                 (unsigned long)status.st_ino);
        if (LIBC(link)(path, grave) != 0 && errno != EEXIST) {
            abort();
        }
    }
    errno = saved;
}

static int opened(int (*libc_openat)(int, const char *, int, ...), int folder, const char *name,
                  int flags, mode_t mode) {
    char path[PATH_MAX];
    absolute(folder, name, path);
    int changes = is_watched(path) && (flags & (O_CREAT | O_TRUNC)) != 0;
    int existed = 1;
    if (changes) {
        existed = access(path, F_OK) == 0;
        errno = 0;
        about_to_change();
    }
    int file = libc_openat(folder, name, flags, mode);
    struct stat status;
    if (changes && 0 <= file && fstat(file, &status) == 0) {
        if (!existed) {
            note("create\t%lu\t%s\n", (unsigned long)status.st_ino, path);
        } else if ((flags & O_TRUNC) != 0) {
            note("truncate\t%lu\t0\n", (unsigned long)status.st_ino);
        }
    }
    return file;
}

#define MODE_ARGUMENT                                                                              \
    mode_t mode = 0;                                                                               \
    if ((flags & (O_CREAT | O_TMPFILE)) != 0) {                                                    \
        va_list arguments;                                                                         \
        va_start(arguments, flags);                                                                \
        mode = va_arg(arguments, mode_t);                                                          \
        va_end(arguments);                                                                         \
    }

int open(const char *path, int flags, ...) {
    MODE_ARGUMENT
    return opened(LIBC(openat), AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    MODE_ARGUMENT
    return opened(LIBC(openat64), AT_FDCWD, path, flags, mode);
}

int openat(int folder, const char *path, int flags, ...) {
    MODE_ARGUMENT
    return opened(LIBC(openat), folder, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) {
    MODE_ARGUMENT
    return opened(LIBC(openat64), folder, path, flags, mode);
}

static int synced(int (*libc_sync)(int), int file) {
    char path[PATH_MAX];
    struct stat status;
    if (!path_of(file, path) || fstat(file, &status) != 0) {
        return libc_sync(file);
    }
    const char *swallow = getenv("POWER_LOSS_SWALLOW");
    size_t length = strlen(path), ending = swallow == NULL ? 0 : strlen(swallow);
    if (0 < ending && ending <= length && strcmp(path + length - ending, swallow) == 0) {
        return 0;
    }
    about_to_change();
    int result = libc_sync(file);
    if (result == 0 && S_ISDIR(status.st_mode)) {
        note("syncdir\t%s\n", path);
    } else if (result == 0) {
        // The length from before the call: what is appended meanwhile need not be included.
        note("sync\t%lu\t%ld\n", (unsigned long)status.st_ino, (long)status.st_size);
    }
    return result;
}

int fsync(int file) { return synced(LIBC(fsync), file); }

int fdatasync(int file) { return synced(LIBC(fdatasync), file); }

static void count_write(int file) {
    char path[PATH_MAX];
    if (getenv("POWER_LOSS_KILL_AT") != NULL && path_of(file, path)) {
        about_to_change();
    }
}

ssize_t write(int file, const void *bytes, size_t length) {
    count_write(file);
    return LIBC(write)(file, bytes, length);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    count_write(file);
    return LIBC(writev)(file, parts, count);
}

ssize_t pwrite64(int file, const void *bytes, size_t length, off64_t offset) {
    count_write(file);
    return LIBC(pwrite64)(file, bytes, length, offset);
}

static int truncated(int (*libc_ftruncate)(int, off64_t), int file, off64_t length) {
    char path[PATH_MAX];
    struct stat status;
    int changes = path_of(file, path) && fstat(file, &status) == 0;
    if (changes) {
        about_to_change();
    }
    int result = libc_ftruncate(file, length);
    if (changes && result == 0) {
        note("truncate\t%lu\t%ld\n", (unsigned long)status.st_ino, (long)length);
    }
    return result;
}

int ftruncate(int file, off_t length) { return truncated(LIBC(ftruncate64), file, length); }

int ftruncate64(int file, off64_t length) { return truncated(LIBC(ftruncate64), file, length); }

static int renamed(int from_folder, const char *from, int to_folder, const char *to,
                   unsigned int flags) {
    char from_path[PATH_MAX], to_path[PATH_MAX];
    absolute(from_folder, from, from_path);
    absolute(to_folder, to, to_path);
    int changes = is_watched(from_path) || is_watched(to_path);
    if (changes) {
        about_to_change();
        bury(to_path);
    }
    int result = LIBC(renameat2)(from_folder, from, to_folder, to, flags);
    if (changes && result == 0) {
        note("rename\t%s\t%s\n", from_path, to_path);
    }
    return result;
}

int rename(const char *from, const char *to) { return renamed(AT_FDCWD, from, AT_FDCWD, to, 0); }

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    return renamed(from_folder, from, to_folder, to, 0);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to,
              unsigned int flags) {
    return renamed(from_folder, from, to_folder, to, flags);
}

int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    absolute(folder, name, path);
    int changes = is_watched(path);
    if (changes) {
        about_to_change();
        bury(path);
    }
    int result = LIBC(unlinkat)(folder, name, flags);
    if (changes && result == 0) {
        note("remove\t%s\n", path);
    }
    return result;
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }

int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char *name, mode_t mode) {
    char path[PATH_MAX];
    absolute(folder, name, path);
    int changes = is_watched(path);
    if (changes) {
        about_to_change();
    }
    int result = LIBC(mkdirat)(folder, name, mode);
    if (changes && result == 0) {
        note("mkdir\t%s\n", path);
    }
    return result;
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    char from_path[PATH_MAX], to_path[PATH_MAX];
    absolute(from_folder, from, from_path);
    absolute(to_folder, to, to_path);
    int changes = is_watched(to_path);
    if (changes) {
        about_to_change();
    }
    int result = LIBC(linkat)(from_folder, from, to_folder, to, flags);
    struct stat status;
    if (changes && result == 0 && lstat(to_path, &status) == 0) {
        note("create\t%lu\t%s\n", (unsigned long)status.st_ino, to_path);
    }
    return result;
}

int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

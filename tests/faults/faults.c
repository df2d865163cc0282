/* A preload library that counts the changes which a program makes to files below one folder, and lets the N-th go wrong:
 *
 *   kill   the process dies before it; every other one dies at its own next change, as if the machine had gone
 *   torn   the same, but the first half of what it writes is there
 *   full   it and all later ones that need room on the disk fail with ENOSPC
 *   broken it alone fails with EIO (flushing to the disk can, too, and is counted in this mode only)
 *
 * What is counted: creating, truncating, writing, naming, linking, removing. The counter lies in a file that all processes
 * map, named by ZEDA_FAULTS; faults_arm() does the same within a process that is already running.
 *
 *   cc -shared -fPIC -O1 -o faults.so faults.c -ldl
 */
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
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MOST = 1 << 16 };
enum mode { COUNT, COUNT_FLUSHES, KILL, TORN, FULL, BROKEN };

struct plan { /* the layout of the file; machine.py writes it */
  _Atomic long count;
  _Atomic long dead;
  long at;
  long mode;
  char root[PATH_MAX];
  char met[PATH_MAX + 64]; /* the change that went wrong, for people */
  char kinds[MOST];        /* of each change: w(rite), n(eeds room), o(ther), f(lush); W: one more write to the same file */
  char last[PATH_MAX];     /* the file written to last */
};

static struct plan *plan;

__attribute__((visibility("default"))) void faults_arm(const char *file) {
  int fd = syscall(SYS_openat, AT_FDCWD, file, O_RDWR | O_CLOEXEC);
  if (fd < 0) abort();
  void *at = mmap(NULL, sizeof(struct plan), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) abort();
  syscall(SYS_close, fd);
  plan = at;
}

__attribute__((constructor)) static void begin(void) {
  const char *file = getenv("ZEDA_FAULTS");
  if (file) faults_arm(file);
}

static int below(const char *path) {
  size_t length = strlen(plan->root);
  return strncmp(path, plan->root, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* The file of an open handle, or the folder of AT_FDCWD. */
static int place(int fd, char *out) {
  char link[64];
  if (fd == AT_FDCWD) strcpy(link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = syscall(SYS_readlink, link, out, PATH_MAX - 1);
  out[length < 0 ? 0 : length] = 0;
  return length >= 0;
}

static int watched(int dirfd, const char *path) {
  if (!plan || !path) return 0;
  if (path[0] == '/') return below(path);
  char full[2 * PATH_MAX];
  if (!place(dirfd, full)) return 0;
  if (strlen(full) + strlen(path) + 2 > sizeof full) return 0;
  strcat(full, "/");
  strcat(full, path);
  return below(full);
}

static int watched_fd(int fd, char *path) { return plan && place(fd, path) && path[0] == '/' && below(path); }

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

/* Count one change. 0: go on; 1: this is it, and the mode is TORN; else an error number. */
static int change(const char *what, const char *path, int needs_room, int flush) {
  if (!plan) return 0;
  if (atomic_load(&plan->dead)) die();
  if (flush && plan->mode != COUNT_FLUSHES && plan->mode != BROKEN) return 0;
  long number = atomic_fetch_add(&plan->count, 1) + 1;
  char kind = flush ? 'f' : strstr(what, "write") || strstr(what, "file") ? 'w' : needs_room ? 'n' : 'o';
  if (kind == 'w' && strncmp(plan->last, path, PATH_MAX) == 0) kind = 'W';
  else if (kind == 'w') strncpy(plan->last, path, PATH_MAX - 1);
  if (number <= MOST) plan->kinds[number - 1] = kind;
  if (plan->at == 0 || number < plan->at) return 0;
  if (number == plan->at) snprintf(plan->met, sizeof plan->met, "%s %.*s", what, PATH_MAX, path);
  switch (plan->mode) {
    case KILL:
      atomic_store(&plan->dead, 1);
      die();
      return 0;
    case TORN:
      return number == plan->at;
    case FULL:
      return needs_room ? ENOSPC : 0;
    case BROKEN:
      return number == plan->at ? EIO : 0;
  }
  return 0;
}

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name); real; })
#define FAIL(number) do { errno = (number); return -1; } while (0)

/* TORN where there is nothing to halve is KILL. */
static int torn_is_kill(int answer) {
  if (answer == 1 && plan->mode == TORN) { atomic_store(&plan->dead, 1); die(); }
  return answer;
}

static int opened(int dirfd, const char *path, int flags) {
  if ((flags & O_TMPFILE) == O_TMPFILE || !watched(dirfd, path)) return 0;
  struct stat status;
  int there = fstatat(dirfd, path, &status, 0) == 0;
  if (there && !S_ISREG(status.st_mode)) return 0;
  int creates = (flags & O_CREAT) && !there, cuts = (flags & O_TRUNC) && there && status.st_size > 0;
  return creates || cuts ? torn_is_kill(change(creates ? "create" : "cut", path, creates, 0)) : 0;
}

#define OPEN(name, dirfd_parameter, dirfd, ...)                                    \
  int name(dirfd_parameter const char *path, int flags, ...) {                     \
    mode_t bits = 0;                                                               \
    if (flags & (O_CREAT | O_TMPFILE)) {                                           \
      va_list rest; va_start(rest, flags); bits = va_arg(rest, int); va_end(rest); \
    }                                                                              \
    int bad = opened(dirfd, path, flags);                                          \
    if (bad) FAIL(bad);                                                            \
    return REAL(name)(__VA_ARGS__ path, flags, bits);                              \
  }
#define COMMA ,
OPEN(open, , AT_FDCWD, )
OPEN(open64, , AT_FDCWD, )
OPEN(openat, int fd COMMA, fd, fd COMMA)
OPEN(openat64, int fd COMMA, fd, fd COMMA)

int creat(const char *path, mode_t bits) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, bits); }
int creat64(const char *path, mode_t bits) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, bits); }

static int flags_of(const char *mode) {
  int both = strchr(mode, '+') != NULL;
  if (mode[0] == 'r') return both ? O_RDWR : O_RDONLY;
  return O_CREAT | (mode[0] == 'w' ? O_TRUNC : 0) | (both ? O_RDWR : O_WRONLY);
}
#define FOPEN(name)                                                \
  FILE *name(const char *path, const char *mode) {                 \
    int bad = opened(AT_FDCWD, path, flags_of(mode));              \
    if (bad) { errno = bad; return NULL; }                         \
    return REAL(name)(path, mode);                                 \
  }
FOPEN(fopen)
FOPEN(fopen64)

/* Half of a write, then the end. */
#define WRITE(name, parameters, arguments, halved)                       \
  ssize_t name parameters {                                              \
    char path[PATH_MAX];                                                 \
    if (!watched_fd(fd, path)) return REAL(name) arguments;              \
    int bad = change(#name, path, 1, 0);                                 \
    if (bad == 1) {                                                      \
      (void)!REAL(name) halved;                                          \
      atomic_store(&plan->dead, 1);                                      \
      die();                                                             \
    }                                                                    \
    if (bad) FAIL(bad);                                                  \
    return REAL(name) arguments;                                         \
  }
WRITE(write, (int fd, const void *data, size_t size), (fd, data, size), (fd, data, size / 2))
WRITE(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), (fd, data, size / 2, at))
WRITE(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at), (fd, data, size / 2, at))
WRITE(writev, (int fd, const struct iovec *v, int n), (fd, v, n), (fd, v, n / 2))
WRITE(pwritev, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at), (fd, v, n / 2, at))
WRITE(pwritev64, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at), (fd, v, n / 2, at))
WRITE(sendfile, (int fd, int in, off_t *at, size_t size), (fd, in, at, size), (fd, in, at, size / 2))
WRITE(sendfile64, (int fd, int in, off64_t *at, size_t size), (fd, in, at, size), (fd, in, at, size / 2))
WRITE(copy_file_range, (int in, off64_t *in_at, int fd, off64_t *at, size_t size, unsigned flags),
      (in, in_at, fd, at, size, flags), (in, in_at, fd, at, size / 2, flags))

#define ONE(name, parameters, is_watched, shown, arguments, needs_room, flush)         \
  int name parameters {                                                                \
    if (is_watched) {                                                                  \
      int bad = torn_is_kill(change(#name, shown, needs_room, flush));                 \
      if (bad) FAIL(bad);                                                              \
    }                                                                                  \
    return REAL(name) arguments;                                                       \
  }
#define AT(fd, path) watched(fd, path)
ONE(rename, (const char *a, const char *b), AT(AT_FDCWD, a) || AT(AT_FDCWD, b), b, (a, b), 0, 0)
ONE(renameat, (int d, const char *a, int e, const char *b), AT(d, a) || AT(e, b), b, (d, a, e, b), 0, 0)
ONE(renameat2, (int d, const char *a, int e, const char *b, unsigned f), AT(d, a) || AT(e, b), b, (d, a, e, b, f), 0, 0)
ONE(link, (const char *a, const char *b), AT(AT_FDCWD, b), b, (a, b), 1, 0)
ONE(linkat, (int d, const char *a, int e, const char *b, int f), AT(e, b), b, (d, a, e, b, f), 1, 0)
ONE(symlink, (const char *a, const char *b), AT(AT_FDCWD, b), b, (a, b), 1, 0)
ONE(symlinkat, (const char *a, int d, const char *b), AT(d, b), b, (a, d, b), 1, 0)
ONE(unlink, (const char *p), AT(AT_FDCWD, p), p, (p), 0, 0)
ONE(unlinkat, (int d, const char *p, int f), AT(d, p), p, (d, p, f), 0, 0)
ONE(remove, (const char *p), AT(AT_FDCWD, p), p, (p), 0, 0)
ONE(rmdir, (const char *p), AT(AT_FDCWD, p), p, (p), 0, 0)
ONE(mkdir, (const char *p, mode_t m), AT(AT_FDCWD, p), p, (p, m), 1, 0)
ONE(mkdirat, (int d, const char *p, mode_t m), AT(d, p), p, (d, p, m), 1, 0)
ONE(truncate, (const char *p, off_t n), AT(AT_FDCWD, p), p, (p, n), 0, 0)
ONE(truncate64, (const char *p, off64_t n), AT(AT_FDCWD, p), p, (p, n), 0, 0)

#define FD(name, parameters, arguments, needs_room, flush)                \
  int name parameters {                                                   \
    char path[PATH_MAX];                                                  \
    if (watched_fd(fd, path)) {                                           \
      int bad = torn_is_kill(change(#name, path, needs_room, flush));     \
      if (bad) FAIL(bad);                                                 \
    }                                                                     \
    return REAL(name) arguments;                                          \
  }
FD(ftruncate, (int fd, off_t n), (fd, n), 0, 0)
FD(ftruncate64, (int fd, off64_t n), (fd, n), 0, 0)
FD(fallocate, (int fd, int m, off_t a, off_t n), (fd, m, a, n), 1, 0)
FD(fallocate64, (int fd, int m, off64_t a, off64_t n), (fd, m, a, n), 1, 0)
FD(fsync, (int fd), (fd), 0, 1)
FD(fdatasync, (int fd), (fd), 0, 1)
/* posix_fallocate gives its error back. */
#undef FAIL
#define FAIL(number) return number
FD(posix_fallocate, (int fd, off_t a, off_t n), (fd, a, n), 1, 0)
FD(posix_fallocate64, (int fd, off64_t a, off64_t n), (fd, a, n), 1, 0)

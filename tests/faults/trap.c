/* Counts the system calls by which this process touches files below one folder, and makes one of them fail.
 *
 * A seccomp filter traps the calls of the table below, whoever makes them: Python, libtorch, Rust. The handler
 * of the trap runs in the process itself; its own calls come from `pass`, which the filter lets through.
 * What is counted stands in shared memory, so that it outlives the process.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { COUNT, FAIL, SHORT, DIE_BEFORE, DIE_AFTER };
enum { EVENTS = 1 << 13, PATH = 200 };

struct event { int64_t call, kind, inode, size, result; char path[PATH]; };
struct plan { int64_t mode, at, number, lasting, reads; };
struct journal { int64_t count, hit; struct event events[EVENTS]; };

/* Where a call names its file: a descriptor, or up to two paths, each with the folder it starts from. */
enum { NONE = -1, HERE = -2 };
enum { OTHER, OPEN, WRITE, SYNC, CLOSE, MAP, READ };
struct call { int number, kind, space, fd, dir, path, second_dir, second_path; };

static const struct call calls[] = {
#ifdef SYS_open
    {SYS_open, OPEN, 1, NONE, HERE, 0, NONE, NONE},
    {SYS_creat, OPEN, 1, NONE, HERE, 0, NONE, NONE},
    {SYS_mkdir, OTHER, 1, NONE, HERE, 0, NONE, NONE},
    {SYS_rmdir, OTHER, 0, NONE, HERE, 0, NONE, NONE},
    {SYS_unlink, OTHER, 0, NONE, HERE, 0, NONE, NONE},
    {SYS_rename, OTHER, 1, NONE, HERE, 0, HERE, 1},
    {SYS_link, OTHER, 1, NONE, HERE, 0, HERE, 1},
    {SYS_symlink, OTHER, 1, NONE, HERE, 1, NONE, NONE},
    {SYS_chmod, OTHER, 0, NONE, HERE, 0, NONE, NONE},
    {SYS_stat, READ, 0, NONE, HERE, 0, NONE, NONE},
    {SYS_lstat, READ, 0, NONE, HERE, 0, NONE, NONE},
    {SYS_readlink, READ, 0, NONE, HERE, 0, NONE, NONE},
#endif
#ifdef SYS_renameat
    {SYS_renameat, OTHER, 1, NONE, 0, 1, 2, 3},
#endif
    {SYS_openat, OPEN, 1, NONE, 0, 1, NONE, NONE},
    {SYS_mkdirat, OTHER, 1, NONE, 0, 1, NONE, NONE},
    {SYS_unlinkat, OTHER, 0, NONE, 0, 1, NONE, NONE},
    {SYS_renameat2, OTHER, 1, NONE, 0, 1, 2, 3},
    {SYS_linkat, OTHER, 1, NONE, 0, 1, 2, 3},
    {SYS_symlinkat, OTHER, 1, NONE, 1, 2, NONE, NONE},
    {SYS_fchmodat, OTHER, 0, NONE, 0, 1, NONE, NONE},
    {SYS_utimensat, OTHER, 0, NONE, 0, 1, NONE, NONE},
    {SYS_truncate, OTHER, 1, NONE, HERE, 0, NONE, NONE},
    {SYS_write, WRITE, 1, 0, NONE, NONE, NONE, NONE},
    {SYS_pwrite64, WRITE, 1, 0, NONE, NONE, NONE, NONE},
    {SYS_writev, WRITE, 1, 0, NONE, NONE, NONE, NONE},
    {SYS_pwritev, WRITE, 1, 0, NONE, NONE, NONE, NONE},
    {SYS_pwritev2, WRITE, 1, 0, NONE, NONE, NONE, NONE},
    {SYS_sendfile, WRITE, 1, 0, NONE, NONE, NONE, NONE},
    {SYS_copy_file_range, WRITE, 1, 2, NONE, NONE, NONE, NONE},
    {SYS_ftruncate, WRITE, 1, 0, NONE, NONE, NONE, NONE},
    {SYS_fallocate, WRITE, 1, 0, NONE, NONE, NONE, NONE},
    {SYS_fchmod, OTHER, 0, 0, NONE, NONE, NONE, NONE},
    {SYS_fsync, SYNC, 0, 0, NONE, NONE, NONE, NONE},
    {SYS_fdatasync, SYNC, 0, 0, NONE, NONE, NONE, NONE},
    {SYS_sync_file_range, OTHER, 0, 0, NONE, NONE, NONE, NONE},
    {SYS_close, CLOSE, 0, 0, NONE, NONE, NONE, NONE},
    {SYS_mmap, MAP, 1, 4, NONE, NONE, NONE, NONE},
    {SYS_newfstatat, READ, 0, NONE, 0, 1, NONE, NONE},
    {SYS_statx, READ, 0, NONE, 0, 1, NONE, NONE},
    {SYS_readlinkat, READ, 0, NONE, 0, 1, NONE, NONE},
    {SYS_fstat, READ, 0, 0, NONE, NONE, NONE, NONE},
    {SYS_read, READ, 0, 0, NONE, NONE, NONE, NONE},
    {SYS_pread64, READ, 0, 0, NONE, NONE, NONE, NONE},
    {SYS_getdents64, READ, 0, 0, NONE, NONE, NONE, NONE},
};
enum { CALLS = sizeof calls / sizeof *calls };

static char root[4096];
static size_t root_length;
static struct plan plan;
static struct journal *journal;

long pass(long number, long a, long b, long c, long d, long e, long f);
extern const char let_through[];
#if defined __x86_64__
__asm__(".text\n.globl pass\npass: mov %rdi,%rax\nmov %rsi,%rdi\nmov %rdx,%rsi\nmov %rcx,%rdx\nmov %r8,%r10\n"
        "mov %r9,%r8\nmov 8(%rsp),%r9\nsyscall\n.globl let_through\n.hidden let_through\nlet_through: ret\n");
#elif defined __aarch64__
__asm__(".text\n.globl pass\npass: mov x8,x0\nmov x0,x1\nmov x1,x2\nmov x2,x3\nmov x3,x4\nmov x4,x5\nmov x5,x6\n"
        "svc #0\n.globl let_through\n.hidden let_through\nlet_through: ret\n");
#else
#error "only x86-64 and AArch64 are known here"
#endif

static int below(const char *path) {
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int link_of(const char *name, char *path) {
    long length = pass(SYS_readlinkat, AT_FDCWD, (long)name, (long)path, 4095, 0, 0);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static int path_of_descriptor(long descriptor, char *path) {
    char name[40] = "/proc/self/fd/", digits[24];
    int used = 0, at = 14;
    if (descriptor < 0) return 0;
    do digits[used++] = '0' + descriptor % 10; while (descriptor /= 10);
    while (used) name[at++] = digits[--used];
    return link_of(name, path);
}

/* Whether a path leads below the folder; `shown` is where, as far as the path says. */
static int path_is_below(long from, const char *path, char *shown) {
    size_t used;
    if (!path) return 0;
    if (path[0] == '/') strncpy(shown, path, 4095);
    else {
        if (!(from == AT_FDCWD ? link_of("/proc/self/cwd", shown) : path_of_descriptor(from, shown))) return 0;
        used = strlen(shown);
        if (path[0] && used < 4000) { shown[used] = '/'; strncpy(shown + used + 1, path, 4094 - used); }
    }
    shown[4095] = 0;
    return below(shown);
}

static int counts(const struct call *call, const long *arguments, char *shown) {
    long flags;
    if (call->kind == READ && !plan.reads) return 0;
    if (call->kind == MAP && (!(arguments[2] & PROT_WRITE) || !(arguments[3] & MAP_SHARED))) return 0;
    if (call->fd != NONE) {
        if (!path_of_descriptor(arguments[call->fd], shown) || !below(shown)) return 0;
        flags = pass(SYS_fcntl, arguments[call->fd], F_GETFL, 0, 0, 0, 0);
        return call->kind != CLOSE || (flags & O_ACCMODE) != O_RDONLY;
    }
    if (path_is_below(call->dir == HERE ? AT_FDCWD : (int)arguments[call->dir], (char *)arguments[call->path], shown))
        return 1;
    return call->second_path != NONE &&
           path_is_below(call->second_dir == HERE ? AT_FDCWD : (int)arguments[call->second_dir],
                         (char *)arguments[call->second_path], shown);
}

static long run(const struct call *call, const long *a) {
    return pass(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static void note(const struct call *call, const long *arguments, const char *shown, long place, long result) {
    struct event *event = &journal->events[place - 1];
    struct stat facts;
    long descriptor = call->kind == OPEN ? result : call->fd == NONE ? -1 : arguments[call->fd];
    event->call = call->number;
    event->kind = call->kind;
    event->result = result;
    event->inode = 0;
    if (call->kind != CLOSE && descriptor >= 0 && !pass(SYS_fstat, descriptor, (long)&facts, 0, 0, 0, 0)) {
        event->inode = facts.st_ino;
        event->size = facts.st_size;
    }
    strncpy(event->path, shown + root_length, PATH - 1);
}

/* A full volume refuses what takes space, a read-only one what changes a file, a broken one everything. */
static int refused(const struct call *call, long place) {
    if (place <= plan.at || !plan.lasting) return place == plan.at;
    return plan.number == ENOSPC ? call->space : plan.number == EROFS ? call->kind != READ : 1;
}

static long act(const struct call *call, long *arguments, long place) {
    if (plan.mode == FAIL && refused(call, place)) {
        journal->hit = plan.at;
        if (call->kind == CLOSE) run(call, arguments);
        return -plan.number;
    }
    if (plan.mode == SHORT && place == plan.at && call->kind == WRITE && arguments[2] > 1 &&
        (call->number == SYS_write || call->number == SYS_pwrite64)) {
        journal->hit = place;
        plan = (struct plan){FAIL, place + 1, ENOSPC, 1, plan.reads};
        arguments[2] /= 2;
    }
    if (plan.mode == DIE_BEFORE && place == plan.at) {
        journal->hit = place;
        pass(SYS_kill, pass(SYS_getpid, 0, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0, 0);
    }
    return run(call, arguments);
}

static void on_trap(int signal, siginfo_t *info, void *context) {
    ucontext_t *saved = context;
    char shown[4096];
    long place, result;
    int before = errno;
    const struct call *call = calls;
#if defined __x86_64__
    greg_t *r = saved->uc_mcontext.gregs;
    long number = r[REG_RAX], arguments[] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
#else
    unsigned long long *r = saved->uc_mcontext.regs;
    long number = r[8], arguments[] = {r[0], r[1], r[2], r[3], r[4], r[5]};
#endif
    (void)signal, (void)info;
    while (call->number != number) call++;
    if (!counts(call, arguments, shown)) result = run(call, arguments);
    else {
        place = __atomic_add_fetch(&journal->count, 1, __ATOMIC_SEQ_CST);
        result = act(call, arguments, place);
        if (place <= EVENTS) note(call, arguments, shown, place, result);
        if (plan.mode == DIE_AFTER && place == plan.at) {
            journal->hit = place;
            pass(SYS_kill, pass(SYS_getpid, 0, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0, 0);
        }
    }
#if defined __x86_64__
    r[REG_RAX] = result;
#else
    r[0] = result;
#endif
    errno = before;
}

/* Trap all threads of this process from now on; 0, or the error number. It cannot be undone. */
int arm(const char *folder, const struct plan *wanted, struct journal *where) {
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_NODEFER};
    struct sock_filter code[2 * CALLS + 8], *end = code;
    struct sock_fprog program = {.filter = code};
    uint64_t own = (uint64_t)(uintptr_t)let_through;
    unsigned left = CALLS + 1;

    strncpy(root, folder, sizeof root - 1);
    root_length = strlen(root);
    plan = *wanted;
    journal = where;
    *end++ = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer));
    *end++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)own, 0, 3);
    *end++ = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4);
    *end++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(own >> 32), 0, 1);
    *end++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    *end++ = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < CALLS; i++) {
        left--;
        *end++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)calls[i].number, left, 0);
    }
    *end++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    *end++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
    program.len = end - code;
    if (sigaction(SIGSYS, &action, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return errno;
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) ? errno : 0;
}

// Between fork and exec only async-signal-safe calls run, because the supervisor has threads: arguments and environment
// are made before the fork.
#include "supervisor/child.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { NUMBER = 16 };

struct arguments {
    char rank[NUMBER], ranks[NUMBER], control_fd[NUMBER], fds[CHILD_MOST_FDS][NUMBER];
    const char *argv[24];
    char visible[256], interface[64];
    const char **envp; // malloc
};

// The supervisor's own notification and socket activation are not its workers' business.
static const char *const own[] = {
    "NOTIFY_SOCKET=", "WATCHDOG_", "LISTEN_PID=", "LISTEN_FDS=", "LISTEN_FDNAMES=", "MAINPID=", NULL};
// Said anew to a rank that has a GPU.
static const char *const of_gpus[] = {"CUDA_VISIBLE_DEVICES=", "CUDA_DEVICE_ORDER=", NULL};

static bool is_one_of(const char *variable, const char *const *names)
{
    for (; *names; names++)
        if (strncmp(variable, *names, strlen(*names)) == 0)
            return true;
    return false;
}

// NCCL's variable that names the interface with this address. False: none has it.
static bool interface_of(const char *address, char *out, size_t n)
{
    struct ifaddrs *all = NULL;
    bool found = false;
    if (getifaddrs(&all) != 0)
        return false;
    for (const struct ifaddrs *i = all; i && !found; i = i->ifa_next) {
        char text[INET6_ADDRSTRLEN] = "";
        const int family = i->ifa_addr ? i->ifa_addr->sa_family : AF_UNSPEC;
        if (family == AF_INET)
            inet_ntop(family, &((struct sockaddr_in *)i->ifa_addr)->sin_addr, text, sizeof text);
        if (family == AF_INET6)
            inet_ntop(family, &((struct sockaddr_in6 *)i->ifa_addr)->sin6_addr, text, sizeof text);
        found = strcmp(text, address) == 0;
        if (found)
            snprintf(out, n, "NCCL_SOCKET_IFNAME==%s", i->ifa_name); // the second "=": this very name
    }
    freeifaddrs(all);
    return found;
}

static int make_arguments(const struct child *c, struct arguments *a, struct err *err)
{
    snprintf(a->rank, NUMBER, "%d", c->rank);
    snprintf(a->ranks, NUMBER, "%d", c->ranks);
    snprintf(a->control_fd, NUMBER, "%d", CHILD_CONTROL_FD);
    const char *argv[] = {c->program,     "--config",     c->config,    "--group", c->group,
                          "--rank",       a->rank,        "--ranks",    a->ranks,  "--incarnation",
                          c->incarnation, "--control-fd", a->control_fd};
    size_t words = sizeof argv / sizeof *argv;
    memcpy(a->argv, argv, sizeof argv);
    for (int i = 0; i < c->n_fds; i++) {
        snprintf(a->fds[i], NUMBER, "%d", CHILD_FIRST_FD + i);
        a->argv[words++] = c->fds[i].option;
        a->argv[words++] = a->fds[i];
    }
    a->argv[words] = NULL;
    size_t n = 0, kept = 0;
    while (environ[n])
        n++;
    a->envp = malloc((n + 5) * sizeof *a->envp);
    if (!a->envp)
        return err_set(err, ERR_NO_MEMORY, "cannot start rank %d of group %s: out of memory", c->rank, c->group);
    for (size_t i = 0; i < n; i++)
        if (!is_one_of(environ[i], own) && !(c->gpus && is_one_of(environ[i], of_gpus)))
            a->envp[kept++] = environ[i];
    if (c->gpus) {
        snprintf(a->visible, sizeof a->visible, "CUDA_VISIBLE_DEVICES=%s", c->gpus);
        a->envp[kept++] = a->visible;
        a->envp[kept++] = "CUDA_DEVICE_ORDER=PCI_BUS_ID"; // as nvidia-smi counts
        if (!getenv("NCCL_NVLS_ENABLE"))
            a->envp[kept++] = "NCCL_NVLS_ENABLE=0"; // nothing here needs NVLink's multicast
        if (c->address && !getenv("NCCL_SOCKET_IFNAME") && interface_of(c->address, a->interface, sizeof a->interface))
            a->envp[kept++] = a->interface;
    }
    a->envp[kept] = NULL;
    return 0;
}

// Runs in the child. The descriptors are moved out of the way first, since any may sit where another must go.
_Noreturn static void become_worker(const struct arguments *a, pid_t parent, int control, const struct child *c)
{
    struct sigaction standard = {.sa_handler = SIG_DFL};
    sigset_t none;
    int high[1 + CHILD_MOST_FDS];
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != parent)
        _exit(127); // the supervisor died before the line above took effect
    setpgid(0, 0);
    sigaction(SIGPIPE, &standard, NULL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    for (int i = 0; i <= c->n_fds; i++)
        if ((high[i] = fcntl(i == 0 ? control : c->fds[i - 1].fd, F_DUPFD_CLOEXEC, 10)) < 0)
            _exit(127);
    if (null < 0 || dup2(null, 0) < 0)
        _exit(127);
    for (int i = 0; i <= c->n_fds; i++)
        if (dup2(high[i], CHILD_CONTROL_FD + i) < 0)
            _exit(127);
    close_range((unsigned)(CHILD_FIRST_FD + c->n_fds), ~0U, 0);
    execve(a->argv[0], (char *const *)a->argv, (char *const *)a->envp);
    _exit(127);
}

int child_spawn(const struct child *c, pid_t *pid, int *control_fd, struct err *err)
{
    struct arguments a;
    int pair[2];
    pid_t parent = getpid();
    TRY(make_arguments(c, &a, err));
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0) {
        free((void *)a.envp);
        return err_set(err, ERR_IO, "cannot make the control socket of rank %d of group %s: %s", c->rank, c->group,
                       strerror(errno));
    }
    fcntl(pair[0], F_SETFL, O_NONBLOCK);
    pid_t child = fork();
    if (child == 0)
        become_worker(&a, parent, pair[1], c);
    int error = errno;
    free((void *)a.envp);
    close(pair[1]);
    if (child < 0) {
        close(pair[0]);
        return err_set(err, ERR_IO, "cannot start rank %d of group %s: fork: %s", c->rank, c->group, strerror(error));
    }
    setpgid(child, child); // here too: whoever comes first, a kill of the group finds it
    *pid = child;
    *control_fd = pair[0];
    return 0;
}

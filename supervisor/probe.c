#include "supervisor/probe.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "proto/clock.h"

static const double REAP_SECONDS = 0.5; // a killed child that waits for a driver inside the kernel stays longer

void *probe_alloc(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

void probe_free(void *memory, size_t bytes)
{
    if (memory)
        munmap(memory, bytes);
}

// True when the other end of the pipe is closed, which is when its process has ended.
static bool wait_closed(int fd, double seconds)
{
    const double end = monotonic_seconds() + seconds;
    struct pollfd p = {.fd = fd, .events = POLLIN};
    for (;;) {
        const double left = end - monotonic_seconds();
        if (left <= 0)
            return false;
        if (poll(&p, 1, (int)(left * 1e3) + 1) > 0)
            return true;
    }
}

// -1: it has not ended.
static int reap(pid_t pid, double seconds)
{
    const double end = monotonic_seconds() + seconds;
    int status = 0;
    for (;;) {
        pid_t got = waitpid(pid, &status, WNOHANG);
        if (got == pid)
            return status;
        if ((got < 0 && errno != EINTR) || monotonic_seconds() > end)
            return -1;
        usleep(1000);
    }
}

int probe_run(void (*body)(void *arg), void *arg, const char *what, double seconds, struct err *err)
{
    int ends[2];
    const pid_t parent = getpid();
    if (pipe2(ends, O_CLOEXEC) != 0)
        return err_set(err, ERR_IO, "%s: pipe: %s", what, strerror(errno));
    fflush(NULL);
    const pid_t pid = fork();
    if (pid == 0) {
        close(ends[0]);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() == parent)
            body(arg);
        _exit(0);
    }
    const int error = errno;
    close(ends[1]);
    const bool ended = pid > 0 && wait_closed(ends[0], seconds);
    close(ends[0]);
    if (pid < 0)
        return err_set(err, ERR_IO, "%s: fork: %s", what, strerror(error));
    if (!ended)
        kill(pid, SIGKILL);
    const int status = reap(pid, ended ? 10 : REAP_SECONDS);
    if (!ended)
        return err_set(err, ERR_TIMEOUT, "%s did not finish within %g s", what, seconds);
    if (status >= 0 && WIFSIGNALED(status))
        return err_set(err, ERR_INTERNAL, "%s died: %s", what, strsignal(WTERMSIG(status)));
    if (status > 0)
        return err_set(err, ERR_INTERNAL, "%s ended by itself, with status %d", what, WEXITSTATUS(status));
    return 0;
}

#include "worker/pulse.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include "proto/clock.h"

static const double RELEASE_MARGIN = 2; // seconds

struct pulse {
    int fd;   // to the supervisor
    int wake; // eventfd: something to send now, or the end
    int term; // signalfd of SIGTERM
    const struct log *log;
    pulse_orphaned *orphaned;
    void *arg;
    pthread_t thread;
    atomic_bool ending;
    atomic_bool draining;
    _Atomic double drain_at;
    pthread_mutex_t lock; // of what follows
    struct msg beat;      // the next BEAT
    bool stage_changed;
    double progress_at;
};

static void wake(struct pulse *p)
{
    const uint64_t one = 1;
    ssize_t ignored = write(p->wake, &one, sizeof one); // full only when a wake is pending anyway
    (void)ignored;
}

// False when the supervisor is gone. A full queue loses a heartbeat, which the next one makes good.
static bool send_msg(struct pulse *p, const struct msg *m)
{
    struct err err = {.code = ERR_NONE};
    int rc = msg_send(p->fd, m, &err);
    return rc == 0 || rc == ERR_TIMEOUT;
}

static bool send_beat(struct pulse *p)
{
    pthread_mutex_lock(&p->lock);
    struct msg beat = p->beat;
    p->stage_changed = false;
    pthread_mutex_unlock(&p->lock);
    return send_msg(p, &beat);
}

static void drain(struct pulse *p)
{
    if (!atomic_load(&p->draining)) {
        atomic_store(&p->drain_at, monotonic_seconds());
        atomic_store(&p->draining, true);
    }
}

// False when the supervisor is gone.
static bool receive(struct pulse *p)
{
    struct err err = {.code = ERR_NONE};
    struct msg m;
    int rc = msg_receive(p->fd, &m, &err);
    if (rc == 0 && m.kind == MSG_DRAIN)
        drain(p);
    if (rc != 0 && rc != ERR_TIMEOUT && rc != ERR_UNAVAILABLE)
        log_line(p->log, LOG_WARN, "control.bad_message", "error=\"%s\"", err.text);
    return rc != ERR_UNAVAILABLE;
}

static void *run(void *arg)
{
    struct pulse *p = arg;
    struct pollfd fds[] = {
        {.fd = p->fd, .events = POLLIN}, {.fd = p->wake, .events = POLLIN}, {.fd = p->term, .events = POLLIN}};
    bool alive = true;
    double next = monotonic_seconds();
    while (alive && !atomic_load(&p->ending)) {
        double wait = next - monotonic_seconds();
        int n = poll(fds, 3, wait > 0 ? (int)(wait * 1000) + 1 : 0);
        if (n < 0 && errno != EINTR)
            break;
        bool woken = false;
        if (n > 0 && fds[1].revents) {
            uint64_t count;
            woken = read(p->wake, &count, sizeof count) == sizeof count;
        }
        struct signalfd_siginfo signal;
        if (n > 0 && fds[2].revents && read(p->term, &signal, sizeof signal) == sizeof signal)
            drain(p);
        if (n > 0 && fds[0].revents)
            alive = receive(p);
        if (alive && (woken || monotonic_seconds() >= next)) {
            alive = send_beat(p);
            next = monotonic_seconds() + MSG_BEAT_SECONDS;
        }
    }
    if (!alive)
        p->orphaned(p->arg);
    return NULL;
}

int pulse_new(int control_fd, const struct log *log, pulse_orphaned *orphaned, void *arg, struct pulse **out,
              struct err *err)
{
    struct pulse *p = calloc(1, sizeof *p);
    sigset_t term;
    *out = NULL;
    if (!p)
        return err_set(err, ERR_NO_MEMORY, "no memory for the heartbeat");
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    *p = (struct pulse){.fd = control_fd,
                        .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
                        .term = signalfd(-1, &term, SFD_CLOEXEC | SFD_NONBLOCK),
                        .log = log,
                        .orphaned = orphaned,
                        .arg = arg,
                        .beat = {.kind = MSG_BEAT, .stage = STAGE_STARTING},
                        .progress_at = monotonic_seconds()};
    pthread_mutex_init(&p->lock, NULL);
    const struct msg hello = {.kind = MSG_HELLO, .pid = getpid()};
    if (p->wake < 0 || p->term < 0 || !send_msg(p, &hello) || pthread_create(&p->thread, NULL, run, p) != 0) {
        if (p->wake >= 0)
            close(p->wake);
        if (p->term >= 0)
            close(p->term);
        pthread_mutex_destroy(&p->lock);
        free(p);
        return err_set(err, ERR_UNAVAILABLE, "control fd %d: the supervisor cannot be reached", control_fd);
    }
    *out = p;
    return 0;
}

void pulse_free(struct pulse *p, const char *reason)
{
    if (!p)
        return;
    atomic_store(&p->ending, true);
    wake(p);
    pthread_join(p->thread, NULL);
    struct msg bye = {.kind = MSG_BYE};
    snprintf(bye.reason, sizeof bye.reason, "%s", reason);
    send_msg(p, &bye);
    close(p->fd);
    close(p->wake);
    close(p->term);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

void pulse_ready(struct pulse *p)
{
    const struct msg ready = {.kind = MSG_READY};
    send_msg(p, &ready);
}

void pulse_report(struct pulse *p, enum stage stage, uint32_t step, uint32_t steps, const char *job)
{
    pthread_mutex_lock(&p->lock);
    const bool changed = p->beat.stage != stage; // steps go with the next regular beat
    const bool pending = p->stage_changed;
    p->beat.stage = stage;
    p->beat.step = step;
    p->beat.steps = steps;
    p->beat.progress++;
    p->progress_at = monotonic_seconds();
    if (job)
        snprintf(p->beat.job, sizeof p->beat.job, "%s", job);
    p->stage_changed |= changed;
    pthread_mutex_unlock(&p->lock);
    if (changed && !pending)
        wake(p);
}

void pulse_busy(struct pulse *p, double seconds)
{
    pthread_mutex_lock(&p->lock);
    p->beat.busy_seconds += seconds;
    pthread_mutex_unlock(&p->lock);
}

bool pulse_draining(struct pulse *p, double *since_s)
{
    const bool draining = atomic_load(&p->draining);
    if (since_s)
        *since_s = draining ? monotonic_seconds() - atomic_load(&p->drain_at) : 0;
    return draining;
}

bool pulse_must_release(struct pulse *p, double grace_s, double step_s)
{
    double since;
    return pulse_draining(p, &since) && since + step_s > grace_s - RELEASE_MARGIN;
}

double pulse_stalled(struct pulse *p, enum stage *stage)
{
    pthread_mutex_lock(&p->lock);
    *stage = p->beat.stage;
    const double seconds = monotonic_seconds() - p->progress_at;
    pthread_mutex_unlock(&p->lock);
    return seconds;
}

// The life of a group as a table, state x event, of small functions. change_state is the only place that changes a
// state.
#include "supervisor/group.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <unistd.h>

#include "proto/clock.h"
#include "proto/msg.h"
#include "supervisor/child.h"
#include "worker/comm/comm.h"

enum event {
    E_START,  // somebody wants it to run
    E_READY,  // the last rank said READY
    E_EXIT,   // a rank's process ended
    E_FAULT,  // a rank hangs, is silent or speaks nonsense
    E_DRAIN,  // stop in good order
    E_KILL,   // stop at once
    E_EMPTY,  // the last process is gone
    E_DUE,    // the time that the state set has come
    E_FORMED, // all nodes have offered their ranks
    E_OVER,   // another node's ranks are gone
    EVENTS,
};

struct happening {
    enum event event;
    int rank;         // E_EXIT, E_FAULT
    int status;       // E_EXIT: as of waitpid
    const char *text; // E_FAULT, E_OVER: what was wrong
};

// What the group is to become once its processes are gone.
enum goal { GOAL_RUN, GOAL_STOP, GOAL_REFORM };

struct rank {
    struct group *group;
    int number;
    pid_t pid; // 0: no process
    int fd;    // control socket, -1: closed
    sd_event_source *source;
    bool hello, ready;
    double started_at, beat_at, moved_at; // monotonic seconds
    double stage_at;                      // when it came into the stage of its last beat
    bool warm;                            // its warm-up, which is no job's work, is seen to be over
    struct msg beat;                      // the last one
    char bye[MSG_REASON_BYTES];
};

struct group {
    const struct group_env *env;
    const struct conf *conf;
    const struct conf_group *my; // in conf; NULL: gone from the configuration
    char name[64], worker[CONF_WORKER_ID_BYTES];
    enum group_state state;
    enum goal goal;
    double due, since;  // when E_DUE fires; when the state was entered
    double alone_since; // while it starts: when another node's ranks were heard to be gone; 0: they are not
    bool settled, fatal;
    unsigned failures;         // in a row, for the backoff
    unsigned restarts;         // in all, for status
    double busy_s, lifetime_s; // of ranks that are gone, and of stages that are over: see group_numbers
    char incarnation[17];
    char *fingerprint; // of the configuration the ranks were started with
    char last_failure[400];
    time_t failed_at;
    struct rank *ranks; // (n_ranks), of the incarnation that runs or ran last
    int n_ranks, live, ready;
    int first_rank;                // of the ranks here among all of the group
    bool spans;                    // nodes, as it was started last
    struct span *span;             // NULL: it has never done so
    char waits_for[GATHER_REASON]; // in GROUP_GATHERING
};

static const char *const state_names[] = {
    [GROUP_STOPPED] = "stopped", [GROUP_GATHERING] = "gathering", [GROUP_STARTING] = "starting",
    [GROUP_READY] = "ready",     [GROUP_DRAINING] = "draining",   [GROUP_KILLING] = "killing",
    [GROUP_BACKOFF] = "backoff", [GROUP_FAILED] = "failed",
};
static_assert(sizeof state_names / sizeof *state_names == GROUP_STATES, "every state has a name");

static void group_raise(struct group *g, struct happening h);

const char *group_state_name(enum group_state state)
{
    return (unsigned)state < GROUP_STATES ? state_names[state] : "unknown";
}

// due_s: seconds from now until E_DUE, INFINITY: never.
static void change_state(struct group *g, enum group_state to, double due_s)
{
    double now = monotonic_seconds();
    log_line(g->env->log, LOG_INFO, "group.state", "group=%s from=%s to=%s seconds=%.3f", g->name,
             state_names[g->state], state_names[to], now - g->since);
    g->state = to;
    g->since = now;
    g->due = now + due_s;
    g->settled |= to != GROUP_STARTING && to != GROUP_KILLING;
}

// ---- the processes

static void note_failure(struct group *g, const char *text)
{
    snprintf(g->last_failure, sizeof g->last_failure, "%.*s", (int)sizeof g->last_failure - 1, text);
    g->failed_at = time(NULL);
    log_line(g->env->log, LOG_ERROR, "group.failure", "group=%s incarnation=%s reason=\"%s\"", g->name, g->incarnation,
             text);
}

static void release(struct group *g, enum err_code code, const char *why)
{
    struct err err;
    err_set(&err, code, "worker %s: %s", g->worker, why);
    if (*g->incarnation)
        g->env->release(g->env->arg, g->worker, g->incarnation, &err);
}

static void close_control(struct rank *r)
{
    r->source = sd_event_source_disable_unref(r->source);
    if (r->fd >= 0)
        close(r->fd);
    r->fd = -1;
}

static void kill_ranks(struct group *g)
{
    for (int i = 0; i < g->n_ranks; i++)
        if (g->ranks[i].pid > 0 && kill(-g->ranks[i].pid, SIGKILL) != 0)
            kill(g->ranks[i].pid, SIGKILL);
}

// The device works for a job. PNG and upload are the CPU's and the network's; beats tell them only where no next job
// is.
static bool computes(enum stage stage)
{
    return stage == STAGE_TEXT || stage == STAGE_DENOISE || stage == STAGE_DECODE;
}

// The time in a stage that is over goes to the group's account.
static void leave_stage(struct rank *r, double now)
{
    if (computes(r->beat.stage) && r->warm)
        r->group->busy_s += now - r->stage_at;
    r->stage_at = now;
}

static void take_message(struct rank *r, const struct msg *m)
{
    struct group *g = r->group;
    double now = monotonic_seconds();
    switch (m->kind) {
    case MSG_HELLO:
        r->hello = true;
        r->beat_at = r->moved_at = now;
        break;
    case MSG_BEAT:
        if (m->progress != r->beat.progress || m->stage != r->beat.stage)
            r->moved_at = now;
        if (m->stage != r->beat.stage)
            leave_stage(r, now);
        r->warm |= r->ready && !computes(m->stage); // READY may overtake the beat that ends the warm-up
        r->beat_at = now;
        r->beat = *m;
        break;
    case MSG_BYE:
        memcpy(r->bye, m->reason, sizeof r->bye);
        break;
    case MSG_READY:
        if (r->ready)
            break;
        r->ready = true;
        r->warm = !computes(r->beat.stage);
        if (++g->ready == g->n_ranks)
            group_raise(g, (struct happening){.event = E_READY});
        break;
    default:
        group_raise(g, (struct happening){.event = E_FAULT, .rank = r->number, .text = "sent a supervisor's message"});
    }
}

// Takes what is there. Bounded: a babbling rank must not keep the loop from the others.
static void read_messages(struct rank *r)
{
    struct msg m;
    struct err err = {0};
    for (int i = 0; i < 64 && r->fd >= 0; i++) {
        int rc = msg_receive(r->fd, &m, &err);
        if (rc == ERR_TIMEOUT)
            return;
        if (rc == ERR_UNAVAILABLE) { // its exit follows; if it does not, silence is noticed
            close_control(r);
            return;
        }
        if (rc != 0) {
            close_control(r);
            group_raise(r->group, (struct happening){.event = E_FAULT, .rank = r->number, .text = err.text});
            return;
        }
        take_message(r, &m);
    }
}

static int on_readable(sd_event_source *source, int fd, uint32_t events, void *arg)
{
    (void)source, (void)fd, (void)events;
    read_messages(arg);
    return 0;
}

// common: what all ranks are given: the region that they share, or where they meet.
static int spawn_rank(struct group *g, int i, int common, struct err *err)
{
    struct rank *r = &g->ranks[i];
    struct child c = {
        .program = g->env->worker_program,
        .config = g->conf->path,
        .group = g->name,
        .incarnation = g->incarnation,
        .rank = g->first_rank + i,
        .ranks = g->my->ranks,
        .gpus = g->my->device != CONF_DEVICE_CUDA ? NULL
                : *g->my->gpu                     ? g->my->gpu
                                                  : "0",
        .address = g->spans ? g->conf->fleet.address : NULL,
        .fds = {{g->spans ? "--meeting-fd" : "--shm-fd", common}},
        .n_fds = 1,
    };
    if (g->spans)
        c.fds[c.n_fds++] = (struct child_fd){"--listen-fd", span_listener(g->span, i)};
    TRY(child_spawn(&c, &r->pid, &r->fd, err));
    g->live++;
    int rc = sd_event_add_io(g->env->event, &r->source, r->fd, EPOLLIN, on_readable, r);
    if (rc < 0)
        return err_set(err, ERR_NO_MEMORY, "cannot watch rank %d: %s", c.rank, strerror(-rc));
    log_line(g->env->log, LOG_INFO, "rank.spawned", "group=%s of_rank=%d pid=%d incarnation=%s", g->name, c.rank,
             (int)r->pid, g->incarnation);
    return 0;
}

// Left behind for the next supervisor: if this one is killed, that one releases the incarnation's jobs.
static void remember_incarnation(struct group *g)
{
    char path[200];
    snprintf(path, sizeof path, "%s/%s.incarnation", g->conf->fleet.state_dir, g->name);
    FILE *f = fopen(path, "we");
    if (!f || fprintf(f, "%s %s\n", g->worker, g->incarnation) < 0)
        log_line(g->env->log, LOG_WARN, "group.incarnation", "group=%s path=\"%s\" error=\"%s\"", g->name, path,
                 strerror(errno));
    if (f)
        fclose(f);
}

// A group that spans nodes has one name for all of them.
static void new_incarnation(struct group *g)
{
    if (g->spans) {
        snprintf(g->incarnation, sizeof g->incarnation, "%s", span_formation(g->span));
        return;
    }
    uint64_t number = 0;
    while (getrandom(&number, sizeof number, 0) != (ssize_t)sizeof number)
        ;
    snprintf(g->incarnation, sizeof g->incarnation, "%016" PRIx64, number);
}

// What the ranks are started with; a group on several nodes holds jobs by the name of the first.
static void remember_configuration(struct group *g)
{
    conf_worker_id(g->conf, g->name, g->worker);
    free(g->fingerprint);
    g->fingerprint = conf_group_fingerprint(g->conf, g->my);
}

static int spawn_ranks(struct group *g, struct err *err)
{
    remember_configuration(g);
    free(g->ranks);
    struct rank *ranks = g->ranks = calloc((size_t)g->my->local_ranks, sizeof *ranks);
    g->n_ranks = ranks ? g->my->local_ranks : 0;
    g->first_rank = g->my->first_rank;
    g->live = g->ready = 0;
    if (!ranks || !g->fingerprint)
        return err_set(err, ERR_NO_MEMORY, "group %s: out of memory", g->name);
    double now = monotonic_seconds();
    for (int i = 0; i < g->n_ranks; i++)
        ranks[i] = (struct rank){.group = g, .number = i, .fd = -1, .started_at = now};
    new_incarnation(g);
    remember_incarnation(g);
    int common = g->spans ? span_meeting(g->span, err) : comm_shm_region(g->n_ranks, g->my->slab_bytes, err);
    if (common < 0)
        return err->code;
    int rc = 0;
    for (int i = 0; i < g->n_ranks && rc == 0; i++)
        rc = spawn_rank(g, i, common, err);
    close(common);
    if (g->spans)
        span_withdraw(g->span);
    return rc;
}

// ---- the actions of the table

static void ignore(struct group *g, const struct happening *h)
{
    (void)g, (void)h;
}

static void never(struct group *g, const struct happening *h)
{
    log_line(g->env->log, LOG_ERROR, "group.bug", "group=%s state=%s event=%d", g->name, state_names[g->state],
             (int)h->event);
}

static void begin_killing_for(struct group *g, enum err_code code, const char *why)
{
    change_state(g, GROUP_KILLING, 5);
    kill_ranks(g);
    release(g, code, why); // now, for speed; again when all are gone, for what was claimed in between
    if (g->live == 0)
        group_raise(g, (struct happening){.event = E_EMPTY});
}

static void begin_killing(struct group *g, const char *why)
{
    begin_killing_for(g, ERR_UNAVAILABLE, why);
}

static void fail_to_start(struct group *g, const struct err *err)
{
    note_failure(g, err->text);
    begin_killing(g, err->text);
}

static void spawn(struct group *g, const struct happening *h)
{
    (void)h;
    struct err err = {0};
    change_state(g, GROUP_STARTING, INFINITY);
    if (spawn_ranks(g, &err) != 0)
        fail_to_start(g, &err);
}

static void start(struct group *g, const struct happening *h)
{
    struct err err = {0};
    g->fatal = false;
    g->alone_since = 0;
    g->goal = GOAL_RUN;
    if (g->state == GROUP_BACKOFF)
        g->restarts++;
    g->spans = g->my->n_nodes > 0;
    if (!g->spans) {
        spawn(g, h);
        return;
    }
    if (!g->span && span_new(&g->span, &err) != 0)
        g->spans = false;
    change_state(g, GROUP_GATHERING, INFINITY);
    remember_configuration(g);
    if (!g->span || span_offer(g->span, g->conf, g->my, &err) != 0)
        fail_to_start(g, &err);
}

static void all_ready(struct group *g, const struct happening *h)
{
    (void)h;
    change_state(g, GROUP_READY, g->conf->restart.healthy_s);
}

static void healthy(struct group *g, const struct happening *h)
{
    (void)h;
    g->failures = 0;
    g->due = INFINITY;
}

static void fault(struct group *g, const struct happening *h)
{
    char text[400];
    snprintf(text, sizeof text, "rank %d (pid %d) %s", g->first_rank + h->rank, (int)g->ranks[h->rank].pid, h->text);
    note_failure(g, text);
    begin_killing(g, text);
}

static void describe_exit(const struct rank *r, int status, char *out, size_t n)
{
    const char *bye = *r->bye ? ": " : "", *reason = r->bye;
    const int number = r->group->first_rank + r->number;
    if (WIFSIGNALED(status))
        snprintf(out, n, "rank %d was killed by signal %d (%s)%s%s", number, WTERMSIG(status),
                 sigabbrev_np(WTERMSIG(status)) ? sigabbrev_np(WTERMSIG(status)) : "?", bye, reason);
    else if (WEXITSTATUS(status) == 127 && !*r->bye)
        snprintf(out, n, "rank %d could not be executed (exit status 127): see [fleet] worker_program", number);
    else
        snprintf(out, n, "rank %d exited with status %d%s%s", number, WEXITSTATUS(status), bye, reason);
}

static bool is_fatal(int status)
{
    return WIFEXITED(status) && WEXITSTATUS(status) == EXIT_DO_NOT_RESTART;
}

static bool is_crash(int signal)
{
    return signal == SIGSEGV || signal == SIGBUS || signal == SIGABRT || signal == SIGFPE;
}

// Whether the death of a rank speaks against the job in hand. SIGKILL does not: it comes from elsewhere, the kernel
// short of memory among them. Nor does any death on a GPU, since nothing here tests whether that GPU is sound.
static bool speaks_against_job(const struct group *g, int status)
{
    if (!g->my || g->my->device == CONF_DEVICE_CUDA)
        return false;
    if (WIFSIGNALED(status) && is_crash(WTERMSIG(status)))
        return true;
    // The rank that crashed may be reaped after one that left because of it.
    for (int i = 0; i < g->n_ranks; i++) {
        siginfo_t info = {.si_pid = 0};
        if (g->ranks[i].pid > 0 && waitid(P_PID, (id_t)g->ranks[i].pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
            info.si_pid != 0 && info.si_code != CLD_EXITED && is_crash(info.si_status))
            return true;
    }
    return false;
}

// Rank 0 told it to leave: its node drains, and this one may not have heard yet.
static void drained_by_others(struct group *g)
{
    g->goal = g->goal == GOAL_RUN ? GOAL_REFORM : g->goal;
    change_state(g, GROUP_DRAINING, g->conf->restart.grace_s);
}

static void rank_lost(struct group *g, const struct happening *h)
{
    char text[400];
    if (g->state == GROUP_READY && g->spans && WIFEXITED(h->status) && WEXITSTATUS(h->status) == 0) {
        drained_by_others(g);
        return;
    }
    describe_exit(&g->ranks[h->rank], h->status, text, sizeof text);
    g->fatal |= is_fatal(h->status);
    note_failure(g, text);
    begin_killing_for(g, speaks_against_job(g, h->status) ? ERR_CRASHED : ERR_UNAVAILABLE, text);
}

// Of ranks that fall one after the other, the one that says "do not restart me" gives the reason.
static void rank_lost_late(struct group *g, const struct happening *h)
{
    char text[400];
    if (g->fatal || !is_fatal(h->status))
        return;
    g->fatal = true;
    describe_exit(&g->ranks[h->rank], h->status, text, sizeof text);
    note_failure(g, text);
}

static void rank_left(struct group *g, const struct happening *h)
{
    if (!WIFEXITED(h->status) || WEXITSTATUS(h->status) != 0)
        rank_lost(g, h);
}

static void drain(struct group *g, const struct happening *h)
{
    (void)h;
    const struct msg m = {.kind = MSG_DRAIN};
    struct err err = {0};
    change_state(g, GROUP_DRAINING, g->conf->restart.grace_s);
    for (int i = 0; i < g->n_ranks; i++)
        if (g->ranks[i].fd >= 0 && msg_send(g->ranks[i].fd, &m, &err) != 0)
            log_line(g->env->log, LOG_WARN, "rank.drain", "group=%s of_rank=%d error=\"%s\"", g->name,
                     g->first_rank + i, err.text);
}

static void others_gone(struct group *g, const struct happening *h)
{
    note_failure(g, h->text);
    begin_killing(g, h->text);
}

// Ranks that still load find out by themselves, and may know better: that it is no use to try again. What is heard of
// the others comes several times a second.
static void others_gone_early(struct group *g, const struct happening *h)
{
    enum { OWN_WORD_S = 1 };
    const double now = monotonic_seconds();
    if (g->alone_since == 0)
        g->alone_since = now;
    if (now - g->alone_since >= OWN_WORD_S)
        others_gone(g, h);
}

static void grace_over(struct group *g, const struct happening *h)
{
    (void)h;
    char text[100];
    snprintf(text, sizeof text, "still running %.1f s after it was told to drain", g->conf->restart.grace_s);
    note_failure(g, text);
    begin_killing(g, text);
}

static void kill_now(struct group *g, const struct happening *h)
{
    (void)h;
    begin_killing(g, "stopped at once on request");
}

static void kill_again(struct group *g, const struct happening *h)
{
    (void)h;
    log_line(g->env->log, LOG_WARN, "group.unkillable", "group=%s ranks=%d", g->name, g->live);
    kill_ranks(g);
    g->due = monotonic_seconds() + 5;
}

// Exponential, with jitter so that groups that fell together do not rise together: half the wait is random.
static double backoff(struct group *g)
{
    uint32_t random = 0;
    double wait = g->conf->restart.backoff_min_s * exp2(g->failures < 30 ? g->failures : 30);
    if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random)
        random = (uint32_t)g->since;
    g->failures++;
    return fmin(wait, g->conf->restart.backoff_max_s) * (0.5 + 0.5 * random / UINT32_MAX);
}

// No process is left: where the goal leads.
static void settle(struct group *g, const struct happening *h)
{
    (void)h;
    bool ran = g->state == GROUP_DRAINING || g->state == GROUP_KILLING;
    if (g->span)
        span_withdraw(g->span);
    if (ran)
        release(g, ERR_UNAVAILABLE, "its processes are gone");
    if (g->goal == GOAL_RUN && ran)
        change_state(g, g->fatal ? GROUP_FAILED : GROUP_BACKOFF, g->fatal ? INFINITY : backoff(g));
    else if (g->state != GROUP_STOPPED)
        change_state(g, GROUP_STOPPED, INFINITY);
    if (g->goal == GOAL_REFORM)
        group_raise(g, (struct happening){.event = E_START});
}

typedef void action(struct group *g, const struct happening *h);
#define ROW(on_start, on_ready, on_exit_, on_fault, on_drain, on_kill, on_empty, on_due, on_formed, on_over)           \
    {                                                                                                                  \
        [E_START] = (on_start), [E_READY] = (on_ready), [E_EXIT] = (on_exit_), [E_FAULT] = (on_fault),                 \
        [E_DRAIN] = (on_drain), [E_KILL] = (on_kill), [E_EMPTY] = (on_empty), [E_DUE] = (on_due),                      \
        [E_FORMED] = (on_formed), [E_OVER] = (on_over)                                                                 \
    }
static_assert(EVENTS == 10, "ROW names every event");
// clang-format off
static action *const table[][EVENTS] = {
    //                       START   READY      EXIT            FAULT   DRAIN   KILL      EMPTY   DUE         FORMED  OVER
    [GROUP_STOPPED]   = ROW(start,  never,     never,          never,  settle, settle,   never,  never,      ignore, ignore),
    [GROUP_GATHERING] = ROW(ignore, never,     never,          never,  settle, settle,   never,  never,      spawn,  ignore),
    [GROUP_STARTING]  = ROW(ignore, all_ready, rank_lost,      fault,  drain,  kill_now, never,  never,      ignore, others_gone_early),
    [GROUP_READY]     = ROW(ignore, never,     rank_lost,      fault,  drain,  kill_now, never,  healthy,    ignore, others_gone),
    [GROUP_DRAINING]  = ROW(ignore, ignore,    rank_left,      fault,  ignore, kill_now, settle, grace_over, ignore, ignore),
    [GROUP_KILLING]   = ROW(ignore, ignore,    rank_lost_late, ignore, ignore, ignore,   settle, kill_again, ignore, ignore),
    [GROUP_BACKOFF]   = ROW(start,  never,     never,          never,  settle, settle,   never,  start,      ignore, ignore),
    [GROUP_FAILED]    = ROW(start,  never,     never,          never,  settle, settle,   never,  never,      ignore, ignore),
};
// clang-format on
static_assert(sizeof table / sizeof *table == GROUP_STATES, "every state has a row");

static void group_raise(struct group *g, struct happening h)
{
    table[g->state][h.event](g, &h);
}

// ---- what the supervisor calls

int group_new(const struct group_env *env, const struct conf *conf, const char *name, struct group **out,
              struct err *err)
{
    struct group *g = calloc(1, sizeof *g);
    if (!g)
        return err_set(err, ERR_NO_MEMORY, "group %s: out of memory", name);
    g->env = env;
    g->conf = conf;
    g->my = conf_group_find(conf, name);
    snprintf(g->name, sizeof g->name, "%s", name);
    conf_worker_id(conf, name, g->worker);
    g->state = GROUP_STOPPED;
    g->due = INFINITY;
    g->since = monotonic_seconds();
    *out = g;
    return 0;
}

void group_free(struct group *g)
{
    if (!g)
        return;
    kill_ranks(g);
    for (int i = 0; i < g->n_ranks; i++)
        close_control(&g->ranks[i]);
    free(g->ranks);
    free(g->fingerprint);
    span_free(g->span);
    free(g);
}

void group_configure(struct group *g, const struct conf *conf)
{
    g->conf = conf;
    g->my = conf_group_find(conf, g->name);
    if (!g->my) {
        group_drain(g);
        return;
    }
    char *now = conf_group_fingerprint(conf, g->my);
    bool same = now && g->fingerprint && strcmp(now, g->fingerprint) == 0;
    free(now);
    if (g->goal == GOAL_STOP || (same && g->state != GROUP_FAILED))
        return;
    g->goal = GOAL_REFORM;
    g->failures = 0;
    group_raise(g, (struct happening){.event = E_DRAIN});
}

void group_start(struct group *g)
{
    // While the old ranks go, a start means: go, then come back.
    g->goal = g->live > 0 && g->goal != GOAL_RUN ? GOAL_REFORM : GOAL_RUN;
    group_raise(g, (struct happening){.event = E_START});
}

void group_drain(struct group *g)
{
    g->goal = GOAL_STOP;
    group_raise(g, (struct happening){.event = E_DRAIN});
}

void group_kill(struct group *g)
{
    g->goal = GOAL_STOP;
    group_raise(g, (struct happening){.event = E_KILL});
}

const struct span_nodes *group_nodes(const struct group *g)
{
    return g->spans ? span_nodes(g->span) : NULL;
}

static enum gather_phase phase_of(enum group_state state)
{
    switch (state) {
    case GROUP_GATHERING:
        return GATHER_OFFER;
    case GROUP_STARTING:
    case GROUP_READY:
        return GATHER_RUN;
    case GROUP_DRAINING:
        return GATHER_DRAIN;
    default:
        return GATHER_AWAY;
    }
}

void group_report(const struct group *g, struct gather_node *out)
{
    char reason[GATHER_REASON] = "";
    if (g->state == GROUP_STOPPED)
        snprintf(reason, sizeof reason, "stopped");
    else if (g->state == GROUP_FAILED || g->state == GROUP_BACKOFF || g->state == GROUP_KILLING)
        snprintf(reason, sizeof reason, "%s: %.300s", state_names[g->state], g->last_failure);
    span_report(g->span, phase_of(g->state), g->incarnation, reason, out);
}

void group_hear(struct group *g, const struct gather_view *view, double now)
{
    char why[GATHER_REASON];
    if (!g->spans)
        return;
    const enum span_news news = span_hear(g->span, phase_of(g->state), g->incarnation, view, now, why);
    if (g->state == GROUP_GATHERING && strcmp(why, g->waits_for) != 0) {
        memcpy(g->waits_for, why, sizeof why);
        log_line(g->env->log, LOG_INFO, "group.waits", "group=%s for=\"%s\"", g->name, why);
    }
    if (news == SPAN_FORMED)
        group_raise(g, (struct happening){.event = E_FORMED});
    if (news == SPAN_OVER)
        group_raise(g, (struct happening){.event = E_OVER, .text = why});
    if (news == SPAN_DRAIN && (g->state == GROUP_STARTING || g->state == GROUP_READY)) {
        g->goal = g->goal == GOAL_RUN ? GOAL_REFORM : g->goal; // it comes back when they do
        group_raise(g, (struct happening){.event = E_DRAIN});
    }
}

bool group_child_exited(struct group *g, pid_t pid, int status)
{
    for (int i = 0; i < g->n_ranks; i++) {
        struct rank *r = &g->ranks[i];
        if (r->pid != pid)
            continue;
        read_messages(r); // its BYE may be waiting
        close_control(r);
        leave_stage(r, monotonic_seconds());
        g->lifetime_s += monotonic_seconds() - r->started_at;
        r->pid = 0;
        r->hello = r->ready = false;
        r->beat = (struct msg){0}; // status must not show the job of a dead rank
        g->live--;
        log_line(g->env->log, LOG_INFO, "rank.exited", "group=%s of_rank=%d pid=%d %s=%d reason=\"%s\"", g->name,
                 g->first_rank + i, (int)pid, WIFSIGNALED(status) ? "signal" : "status",
                 WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status), r->bye);
        bool killing = g->state == GROUP_KILLING;
        group_raise(g, (struct happening){.event = E_EXIT, .rank = i, .status = status});
        // begin_killing has said E_EMPTY itself when this was the last one
        if (g->live == 0 && (killing || g->state == GROUP_DRAINING))
            group_raise(g, (struct happening){.event = E_EMPTY});
        return true;
    }
    return false;
}

// Seconds without progress that stage may take; INFINITY: no limit of its own.
static double stage_limit(const struct conf *c, enum stage stage)
{
    switch (stage) {
    case STAGE_STARTING:
    case STAGE_LOADING:
        return c->deadline.load_s;
    case STAGE_TEXT:
        return c->deadline.text_s;
    case STAGE_DENOISE:
        return c->deadline.denoise_s;
    case STAGE_DECODE:
        return c->deadline.decode_s;
    case STAGE_PNG:
        return c->deadline.png_s;
    case STAGE_UPLOAD:
        return c->deadline.upload_s;
    case STAGE_EXITING:
        return MSG_SILENT_SECONDS;
    default: // idle; draining is bounded by the grace time
        return INFINITY;
    }
}

// When rank r counts as hung, and for what reason.
static double rank_due(const struct group *g, const struct rank *r, char *why, size_t n)
{
    const struct conf *c = g->conf;
    if (!r->hello) {
        snprintf(why, n, "said nothing for %.1f s after its start", c->deadline.load_s);
        return r->started_at + c->deadline.load_s;
    }
    double silent = r->beat_at + MSG_SILENT_SECONDS, stuck = r->moved_at + stage_limit(c, r->beat.stage);
    if (silent < stuck) {
        snprintf(why, n, "is silent: no heartbeat for %.1f s", MSG_SILENT_SECONDS);
        return silent;
    }
    snprintf(why, n, "hangs: no progress for %.1f s in stage %s, step %u of %u", stage_limit(c, r->beat.stage),
             stage_name(r->beat.stage), r->beat.step, r->beat.steps);
    return stuck;
}

static bool is_watched(const struct group *g, const struct rank *r)
{
    return r->pid > 0 && (g->state == GROUP_STARTING || g->state == GROUP_READY || g->state == GROUP_DRAINING);
}

double group_next(const struct group *g)
{
    char why[160];
    double next = g->due;
    for (int i = 0; i < g->n_ranks; i++)
        if (is_watched(g, &g->ranks[i]))
            next = fmin(next, rank_due(g, &g->ranks[i], why, sizeof why));
    return next;
}

void group_tick(struct group *g, double now)
{
    char why[160];
    for (int i = 0; i < g->n_ranks; i++)
        if (is_watched(g, &g->ranks[i]) && rank_due(g, &g->ranks[i], why, sizeof why) <= now)
            group_raise(g, (struct happening){.event = E_FAULT, .rank = i, .text = why});
    if (g->due <= now)
        group_raise(g, (struct happening){.event = E_DUE});
}

const char *group_name(const struct group *g)
{
    return g->name;
}

enum group_state group_state(const struct group *g)
{
    return g->state;
}

bool group_orphaned(const struct group *g)
{
    return !g->my;
}

bool group_settled(const struct group *g)
{
    return g->settled || (g->state == GROUP_STOPPED && g->goal == GOAL_STOP);
}

static json_t *rank_status(const struct rank *r, double now)
{
    return json_pack("{s:i,s:i,s:b,s:s,s:i,s:i,s:I,s:s,s:f,s:f}", "rank", r->group->first_rank + r->number, "pid",
                     (int)r->pid, "ready", r->ready, "stage", r->pid > 0 ? stage_name(r->beat.stage) : "gone", "step",
                     (int)r->beat.step, "steps", (int)r->beat.steps, "progress", (json_int_t)r->beat.progress, "job",
                     r->beat.job, "busy_seconds", r->beat.busy_seconds, "beat_age_seconds",
                     r->hello ? now - r->beat_at : -1.0);
}

json_t *group_status(const struct group *g)
{
    double now = monotonic_seconds();
    json_t *ranks = json_array(), *models = json_array();
    for (int i = 0; i < g->n_ranks; i++)
        json_array_append_new(ranks, rank_status(&g->ranks[i], now));
    for (int i = 0; g->my && i < g->my->model.count; i++)
        json_array_append_new(models, json_sprintf("%s@%s", g->my->models[i].name, g->my->models[i].version));
    return json_pack("{s:s,s:s,s:s,s:s,s:f,s:f,s:i,s:s,s:I,s:s,s:s,s:o,s:o}", "name", g->name, "worker", g->worker,
                     "state", state_names[g->state], "incarnation", g->incarnation, "state_seconds", now - g->since,
                     "next_seconds", isfinite(g->due) ? fmax(0, g->due - now) : -1.0, "restarts", (int)g->restarts,
                     "last_failure", g->last_failure, "failed_at", (json_int_t)g->failed_at, "nodes",
                     g->my ? g->my->nodes : "", "waits_for", g->state == GROUP_GATHERING ? g->waits_for : "", "models",
                     models, "ranks", ranks);
}

void group_numbers(const struct group *g, struct group_numbers *out)
{
    double now = monotonic_seconds();
    *out = (struct group_numbers){.state = g->state,
                                  .restarts = g->restarts,
                                  .ranks = (unsigned)g->n_ranks,
                                  .busy_s = g->busy_s,
                                  .lifetime_s = g->lifetime_s};
    memcpy(out->name, g->name, sizeof out->name);
    for (int i = 0; i < g->n_ranks; i++) {
        const struct rank *r = &g->ranks[i];
        if (r->pid <= 0)
            continue;
        out->stage[r->beat.stage]++;
        out->lifetime_s += now - r->started_at;
        if (r->warm && computes(r->beat.stage))
            out->busy_s += now - r->stage_at;
    }
}

// The main loop: sd-event sources for signals, children's messages, the control socket and the queue thread. After each
// of them tidy() looks at the whole; time is one timer, armed for the earliest deadline of any group.
#include "supervisor/supervisor.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <systemd/sd-daemon.h>
#include <systemd/sd-event.h>
#include <unistd.h>

#include "proto/clock.h"
#include "supervisor/callback.h"
#include "supervisor/control.h"
#include "supervisor/gatherer.h"
#include "supervisor/group.h"
#include "supervisor/metrics.h"
#include "supervisor/queue_thread.h"
#include "supervisor/spot.h"
#include "worker/moderation.h"

// How long an exit waits for Redis to take the jobs back; after a second signal, and in the first place.
#define RELEASE_SECONDS         5.0
#define RELEASE_SECONDS_AT_ONCE 1.0
// How often the loop tells its numbers, where metrics are served.
#define TELL_SECONDS 1.0

struct supervisor {
    struct conf *conf;
    struct log log;
    char worker_program[PATH_MAX];
    int lock_fd;
    sd_event *event;
    sd_event_source *timer;
    struct queue_thread *queue;
    struct queue_thread_status redis;
    struct gatherer *gatherer; // NULL: no group has spanned nodes yet
    struct callback *callback; // NULL: none are made
    struct control *control;
    struct spot *spot;       // NULL: nobody is asked
    bool spot_noticed;       // the machine goes away: nothing is started by itself any more
    struct metrics *metrics; // NULL: none are served
    double tell_at;          // when they are told next; INFINITY: never
    struct group_env env;
    struct group **groups; // (n_groups)
    int n_groups;
    int stop_signals; // SIGTERM and SIGINT so far
    double exit_at;   // everything has stopped: go even if Redis took not all; INFINITY: not yet
    bool ready_told;
    char told[160]; // the last STATUS= line
};

// ---- groups

static int add_group(struct supervisor *s, const struct conf *conf, const char *name, struct err *err)
{
    // NOLINTNEXTLINE(bugprone-sizeof-expression): an array of pointers is meant
    struct group **groups = realloc((void *)s->groups, sizeof *groups * (size_t)(s->n_groups + 1));
    if (!groups)
        return err_set(err, ERR_NO_MEMORY, "group %s: out of memory", name);
    s->groups = groups;
    TRY(group_new(&s->env, conf, name, &groups[s->n_groups], err));
    s->n_groups++;
    if (!s->spot_noticed)
        group_start(groups[s->n_groups - 1]);
    return 0;
}

static struct group *find_group(const struct supervisor *s, const char *name)
{
    for (int i = 0; i < s->n_groups; i++)
        if (strcmp(group_name(s->groups[i]), name) == 0)
            return s->groups[i];
    return NULL;
}

static int add_missing_groups(struct supervisor *s, const struct conf *conf, struct err *err)
{
    for (int i = 0; i < conf->n_groups; i++)
        if (!find_group(s, conf->groups[i].name))
            TRY(add_group(s, conf, conf->groups[i].name, err));
    return 0;
}

static void release(void *arg, const char *worker, const char *incarnation, const struct err *why)
{
    struct supervisor *s = arg;
    queue_thread_release(s->queue, worker, incarnation, why);
}

// A supervisor that was killed left its workers' incarnations here: what they held goes back now.
static void release_leftovers(struct supervisor *s)
{
    static const char suffix[] = ".incarnation";
    DIR *dir = opendir(s->conf->fleet.state_dir);
    struct err why;
    err_set(&why, ERR_UNAVAILABLE, "the node's supervisor was killed");
    for (struct dirent *e; dir && (e = readdir(dir));) {
        char worker[CONF_WORKER_ID_BYTES], incarnation[17];
        size_t n = strlen(e->d_name);
        if (n < sizeof suffix || strcmp(e->d_name + n - strlen(suffix), suffix) != 0)
            continue;
        int fd = openat(dirfd(dir), e->d_name, O_RDONLY | O_CLOEXEC);
        FILE *f = fd >= 0 ? fdopen(fd, "r") : NULL;
        if (f && fscanf(f, "%127s %16s", worker, incarnation) == 2)
            queue_thread_release(s->queue, worker, incarnation, &why);
        if (f)
            fclose(f);
        unlinkat(dirfd(dir), e->d_name, 0);
    }
    if (dir)
        closedir(dir);
}

// ---- after every event

static void tell_systemd(struct supervisor *s)
{
    int ready = 0, failed = 0, settled = 0;
    char text[sizeof s->told];
    for (int i = 0; i < s->n_groups; i++) {
        ready += group_state(s->groups[i]) == GROUP_READY;
        failed += group_state(s->groups[i]) == GROUP_FAILED;
        settled += group_settled(s->groups[i]);
    }
    snprintf(text, sizeof text, "%s%s%d of %d groups ready, %d failed; Redis %s", s->stop_signals ? "stopping; " : "",
             s->spot_noticed ? "spot notice; " : "", ready, s->n_groups, failed,
             s->redis.up      ? "answers"
             : s->redis.known ? "does not answer"
                              : "not asked yet");
    if (strcmp(text, s->told) != 0) {
        memcpy(s->told, text, sizeof text);
        sd_notifyf(0, "STATUS=%s", text);
    }
    if (!s->ready_told && settled == s->n_groups) {
        s->ready_told = true;
        sd_notify(0, "READY=1");
        log_line(&s->log, LOG_INFO, "supervisor.ready", "groups=%d ready=%d failed=%d", s->n_groups, ready, failed);
    }
}

static void free_orphans(struct supervisor *s)
{
    for (int i = 0; i < s->n_groups; i++)
        if (group_orphaned(s->groups[i]) && group_state(s->groups[i]) == GROUP_STOPPED) {
            if (s->gatherer)
                gatherer_forget(s->gatherer, group_name(s->groups[i]));
            group_free(s->groups[i]);
            s->groups[i--] = s->groups[--s->n_groups];
        }
}

// Told to stop: ends the loop once every process is gone and Redis took the jobs, or had its time.
static void leave_when_stopped(struct supervisor *s)
{
    if (!s->stop_signals)
        return;
    for (int i = 0; i < s->n_groups; i++)
        if (group_state(s->groups[i]) != GROUP_STOPPED)
            return;
    double now = monotonic_seconds();
    if (isinf(s->exit_at))
        s->exit_at = now + (s->stop_signals > 1 ? RELEASE_SECONDS_AT_ONCE : RELEASE_SECONDS);
    if (s->redis.pending == 0 || now >= s->exit_at)
        sd_event_exit(s->event, 0);
}

// Also when nothing happens: that is how the metrics know that the loop turns.
static void tell_metrics(struct supervisor *s)
{
    double now = monotonic_seconds();
    if (!s->metrics || now < s->tell_at)
        return;
    s->tell_at = now + TELL_SECONDS;
    struct group_numbers *groups = calloc((size_t)s->n_groups + 1, sizeof *groups);
    for (int i = 0; groups && i < s->n_groups; i++)
        group_numbers(s->groups[i], &groups[i]);
    if (groups)
        metrics_tell(s->metrics, groups, (size_t)s->n_groups);
    free(groups);
}

static void tell_nodes(struct supervisor *s)
{
    struct gather_node mine;
    for (int i = 0; s->gatherer && i < s->n_groups; i++) {
        if (!group_nodes(s->groups[i])) {
            gatherer_forget(s->gatherer, group_name(s->groups[i]));
            continue;
        }
        group_report(s->groups[i], &mine);
        gatherer_say(s->gatherer, group_nodes(s->groups[i]), &mine);
    }
}

static void arm_timer(struct supervisor *s)
{
    double next = fmin(s->exit_at, s->tell_at), now = monotonic_seconds();
    for (int i = 0; i < s->n_groups; i++)
        next = fmin(next, group_next(s->groups[i]));
    sd_event_source_set_enabled(s->timer, isfinite(next) ? SD_EVENT_ONESHOT : SD_EVENT_OFF);
    if (isfinite(next))
        sd_event_source_set_time(s->timer, (uint64_t)(1e6 * fmax(next, now)) + 1);
}

static void tidy(struct supervisor *s)
{
    queue_thread_status(s->queue, &s->redis);
    tell_nodes(s);
    free_orphans(s);
    tell_systemd(s);
    tell_metrics(s);
    leave_when_stopped(s);
    arm_timer(s);
}

static int on_post(sd_event_source *source, void *arg)
{
    (void)source;
    tidy(arg);
    return 0;
}

// Runs below every other source, so that beats which wait to be read are read before anybody is called silent.
static int on_timer(sd_event_source *source, uint64_t usec, void *arg)
{
    (void)source, (void)usec;
    struct supervisor *s = arg;
    double now = monotonic_seconds();
    for (int i = 0; i < s->n_groups; i++)
        group_tick(s->groups[i], now);
    return 0;
}

static int on_queue(sd_event_source *source, int fd, uint32_t events, void *arg)
{
    (void)source, (void)fd, (void)events, (void)arg; // tidy() follows, and reads it
    return 0;
}

// A view counts while it answers what is still so.
static int on_nodes(sd_event_source *source, int fd, uint32_t events, void *arg)
{
    (void)source, (void)fd, (void)events;
    struct supervisor *s = arg;
    gatherer_rest(s->gatherer);
    for (int i = 0; i < s->n_groups; i++) {
        struct gather_node mine;
        struct gather_view view;
        if (!group_nodes(s->groups[i]))
            continue;
        group_report(s->groups[i], &mine);
        if (!gatherer_hear(s->gatherer, group_name(s->groups[i]), &mine, &view))
            continue;
        group_hear(s->groups[i], &view, monotonic_seconds());
        gather_view_free(&view);
    }
    return 0;
}

// Begun by the first configuration that has a group of several nodes.
static int watch_nodes(struct supervisor *s, const struct conf *conf, struct err *err)
{
    bool wanted = s->gatherer != NULL;
    for (int i = 0; i < conf->n_groups && !wanted; i++)
        wanted = conf->groups[i].n_nodes > 0;
    if (!wanted || s->gatherer)
        return 0;
    TRY(gatherer_start(conf, &s->log, &s->gatherer, err));
    int rc = sd_event_add_io(s->event, NULL, gatherer_fd(s->gatherer), EPOLLIN, on_nodes, s);
    return rc < 0 ? err_set(err, ERR_IO, "cannot watch for other nodes: %s", strerror(-rc)) : 0;
}

// The supervisor stays: restarted, it would serve again until it saw the notice.
static int on_spot(sd_event_source *source, int fd, uint32_t events, void *arg)
{
    (void)fd, (void)events;
    struct supervisor *s = arg;
    sd_event_source_set_enabled(source, SD_EVENT_OFF);
    s->spot_noticed = true;
    for (int i = 0; i < s->n_groups; i++)
        group_drain(s->groups[i]);
    return 0;
}

static int watch_spot(struct supervisor *s, struct err *err)
{
    if (strcmp(s->conf->node.spot_notice, "off") == 0)
        return 0;
    TRY(spot_start(s->conf->node.spot_notice, &s->log, &s->spot, err));
    int rc = sd_event_add_io(s->event, NULL, spot_fd(s->spot), EPOLLIN, on_spot, s);
    return rc < 0 ? err_set(err, ERR_IO, "cannot watch for a spot notice: %s", strerror(-rc)) : 0;
}

// ---- signals

static int on_child(sd_event_source *source, const struct signalfd_siginfo *info, void *arg)
{
    (void)source, (void)info;
    struct supervisor *s = arg;
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        bool ours = false;
        for (int i = 0; i < s->n_groups && !ours; i++)
            ours = group_child_exited(s->groups[i], pid, status);
        if (!ours) // as PID 1: an orphan of the container
            log_line(&s->log, LOG_DEBUG, "child.stray", "pid=%d", (int)pid);
    }
    return 0;
}

static int on_stop(sd_event_source *source, const struct signalfd_siginfo *info, void *arg)
{
    (void)source;
    struct supervisor *s = arg;
    s->stop_signals++;
    log_line(&s->log, LOG_INFO, "supervisor.stop", "signal=%d %s", (int)info->ssi_signo,
             s->stop_signals > 1 ? "at_once=true" : "");
    if (s->stop_signals == 1)
        sd_notify(0, "STOPPING=1");
    if (s->stop_signals == 2)
        s->exit_at = INFINITY; // counted anew, shorter
    if (s->stop_signals > 2)
        sd_event_exit(s->event, 0);
    for (int i = 0; i < s->n_groups; i++)
        (s->stop_signals > 1 ? group_kill : group_drain)(s->groups[i]);
    return 0;
}

// What a running supervisor cannot change.
static int check_reload(const struct conf *old, const struct conf *new, struct err *err)
{
    if (strcmp(old->redis.url, new->redis.url) != 0 || strcmp(old->redis.queue, new->redis.queue) != 0)
        return err_set(err, ERR_UNSUPPORTED, "%s: [redis] changed; restart the supervisor for that", new->path);
    if (strcmp(old->metrics.listen, new->metrics.listen) != 0)
        return err_set(err, ERR_UNSUPPORTED, "%s: [metrics] changed; restart the supervisor for that", new->path);
    if (strcmp(old->node.spot_notice, new->node.spot_notice) != 0)
        return err_set(err, ERR_UNSUPPORTED, "%s: [node] changed; restart the supervisor for that", new->path);
    if (strcmp(old->fleet.node, new->fleet.node) != 0 || strcmp(old->fleet.address, new->fleet.address) != 0 ||
        strcmp(old->fleet.state_dir, new->fleet.state_dir) != 0 ||
        strcmp(old->fleet.worker_program, new->fleet.worker_program) != 0)
        return err_set(err, ERR_UNSUPPORTED, "%s: [fleet] changed; restart the supervisor for that", new->path);
    return 0;
}

// As conf has it: none, begun, or with other settings. After an error all is as before.
static int set_callback(struct supervisor *s, const struct conf *conf, struct err *err)
{
    if (*conf->callback.secret_file)
        return s->callback ? callback_configure(s->callback, conf, &s->log, err)
                           : callback_start(&s->callback, conf, &s->log, err);
    callback_stop(s->callback);
    s->callback = NULL;
    return 0;
}

static int check_moderation(const struct conf *conf, struct err *err)
{
    const struct log silent = {.fd = -1, .level = LOG_ERROR, .prog = ""};
    struct moderation *m = NULL;
    TRY(moderation_new(conf, &silent, &m, err));
    moderation_free(m);
    return 0;
}

static int reload(struct supervisor *s, struct err *err)
{
    struct conf *new = NULL;
    TRY(conf_load(s->conf->path, &new, err));
    const enum log_level level = s->log.level;
    int rc = check_reload(s->conf, new, err);
    s->log.level = (enum log_level) new->log.level;
    rc = rc ? rc : check_moderation(new, err);
    rc = rc ? rc : set_callback(s, new, err);
    rc = rc ? rc : watch_nodes(s, new, err);
    rc = rc ? rc : queue_thread_configure(s->queue, new, &s->log, err);
    if (rc != 0) {
        s->log.level = level;
        conf_free(new);
        return rc;
    }
    for (int i = 0; i < s->n_groups; i++)
        group_configure(s->groups[i], new);
    conf_free(s->conf);
    s->conf = new;
    return add_missing_groups(s, new, err);
}

static int on_reload(sd_event_source *source, const struct signalfd_siginfo *info, void *arg)
{
    (void)source, (void)info;
    struct supervisor *s = arg;
    struct err err = {0};
    if (s->stop_signals)
        return 0;
    sd_notifyf(0, "RELOADING=1\nMONOTONIC_USEC=%.0f", 1e6 * monotonic_seconds());
    if (reload(s, &err) == 0)
        log_line(&s->log, LOG_INFO, "supervisor.reloaded", "path=\"%s\" groups=%d", s->conf->path, s->conf->n_groups);
    else
        log_line(&s->log, LOG_ERROR, "supervisor.reload", "kept=\"the running configuration\" error=\"%s\"", err.text);
    if (s->ready_told)
        sd_notify(0, "READY=1");
    return 0;
}

// ---- the control socket

static json_t *status(struct supervisor *s)
{
    json_t *groups = json_array();
    for (int i = 0; i < s->n_groups; i++)
        json_array_append_new(groups, group_status(s->groups[i]));
    return json_pack("{s:b,s:s,s:i,s:s,s:b,s:s,s:{s:b,s:s,s:s},s:i,s:I,s:o}", "ok", 1, "node", s->conf->fleet.node,
                     "pid", (int)getpid(), "state", s->stop_signals ? "stopping" : "running", "spot_notice",
                     s->spot_noticed, "role", s->conf->n_groups ? "workers" : "queue", "redis", "up", s->redis.up,
                     "queue", s->conf->redis.queue, "error", s->redis.error, "releases_pending", (int)s->redis.pending,
                     "jobs_released", (json_int_t)s->redis.released, "groups", groups);
}

// drain or resume, of one group or all; answers with the names.
static json_t *steer(struct supervisor *s, const json_t *request, void (*act)(struct group *))
{
    const json_t *only = json_object_get(request, "group");
    const char *name = json_string_value(only);
    if (s->stop_signals)
        return json_pack("{s:b,s:s}", "ok", 0, "error", "the supervisor is stopping");
    if (only && (!name || !find_group(s, name)))
        return json_pack("{s:b,s:s}", "ok", 0, "error", "there is no group of this name; see status");
    json_t *names = json_array();
    for (int i = 0; i < s->n_groups; i++)
        if (!group_orphaned(s->groups[i]) && (!name || strcmp(group_name(s->groups[i]), name) == 0)) {
            json_array_append_new(names, json_string(group_name(s->groups[i])));
            act(s->groups[i]);
        }
    return json_pack("{s:b,s:o}", "ok", 1, "groups", names);
}

static json_t *on_request(void *arg, const json_t *request)
{
    struct supervisor *s = arg;
    const char *cmd = json_string_value(json_object_get(request, "cmd"));
    if (cmd && strcmp(cmd, "status") == 0)
        return status(s);
    if (cmd && strcmp(cmd, "drain") == 0)
        return steer(s, request, group_drain);
    if (cmd && strcmp(cmd, "resume") == 0)
        return steer(s, request, group_start);
    return json_pack("{s:b,s:s}", "ok", 0, "error", "\"cmd\" must be \"status\", \"drain\" or \"resume\"");
}

// ---- start and end

// Its path goes to path, PATH_MAX bytes.
static int find_worker(const struct conf *conf, char *path, struct err *err)
{
    struct stat st;
    if (*conf->fleet.worker_program) {
        snprintf(path, PATH_MAX, "%s", conf->fleet.worker_program);
    } else {
        ssize_t n = readlink("/proc/self/exe", path, PATH_MAX - 32);
        path[n > 0 ? n : 0] = 0;
        char *slash = strrchr(path, '/');
        memcpy(slash ? slash + 1 : path, "ditfleet-worker", sizeof "ditfleet-worker");
    }
    if (conf->n_groups && (stat(path, &st) != 0 || !S_ISREG(st.st_mode) || access(path, X_OK) != 0))
        return err_set(err, ERR_NOT_FOUND, "%s: no worker program to execute there; see [fleet] worker_program", path);
    return 0;
}

static int take_lock(struct supervisor *s, struct err *err)
{
    char path[200], pid[16] = "";
    const char *dir = s->conf->fleet.state_dir;
    if (mkdir(dir, 0700) != 0 && errno != EEXIST)
        return err_set(err, ERR_IO, "%s: cannot make the state directory: %s; see [fleet] state_dir", dir,
                       strerror(errno));
    snprintf(path, sizeof path, "%s/lock", dir);
    s->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (s->lock_fd < 0)
        return err_set(err, ERR_IO, "%s: cannot open the lock file: %s", path, strerror(errno));
    if (flock(s->lock_fd, LOCK_EX | LOCK_NB) != 0) {
        ssize_t n = read(s->lock_fd, pid, sizeof pid - 1);
        pid[n > 0 ? strcspn(pid, "\n") : 0] = 0;
        return err_set(err, ERR_CONFLICT,
                       "another supervisor (pid %s) runs on %s; stop it, or use another [fleet] state_dir",
                       *pid ? pid : "unknown", dir);
    }
    if (ftruncate(s->lock_fd, 0) != 0 || dprintf(s->lock_fd, "%d\n", (int)getpid()) < 0)
        return err_set(err, ERR_IO, "%s: cannot write the lock file: %s", path, strerror(errno));
    return 0;
}

static int open_loop(struct supervisor *s, struct err *err)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGHUP);
    sigaddset(&signals, SIGCHLD);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
    sd_event_source *post = NULL;
    sd_event *e = NULL;
    int rc = sd_event_new(&e);
    s->event = e;
    if (rc < 0 || (rc = sd_event_add_signal(e, NULL, SIGTERM, on_stop, s)) < 0 ||
        (rc = sd_event_add_signal(e, NULL, SIGINT, on_stop, s)) < 0 ||
        (rc = sd_event_add_signal(e, NULL, SIGHUP, on_reload, s)) < 0 ||
        (rc = sd_event_add_signal(e, NULL, SIGCHLD, on_child, s)) < 0 ||
        (rc = sd_event_add_time(e, &s->timer, CLOCK_MONOTONIC, UINT64_MAX, 1, on_timer, s)) < 0 ||
        (rc = sd_event_source_set_priority(s->timer, SD_EVENT_PRIORITY_IDLE)) < 0 ||
        (rc = sd_event_add_post(e, &post, on_post, s)) < 0 || (rc = sd_event_source_set_floating(post, 1)) < 0 ||
        (rc = sd_event_set_watchdog(e, 1)) < 0)
        return err_set(err, ERR_IO, "cannot set up the event loop: %s", strerror(-rc));
    sd_event_source_unref(post);
    return 0;
}

static int open_everything(struct supervisor *s, struct err *err)
{
    char path[CONTROL_PATH_BYTES];
    TRY(find_worker(s->conf, s->worker_program, err));
    TRY(take_lock(s, err));
    TRY(open_loop(s, err));
    TRY(queue_thread_start(&s->queue, s->conf, &s->log, err));
    int rc = sd_event_add_io(s->event, NULL, queue_thread_fd(s->queue), EPOLLIN, on_queue, s);
    if (rc < 0)
        return err_set(err, ERR_IO, "cannot watch the queue thread: %s", strerror(-rc));
    if (*s->conf->metrics.listen) {
        TRY(metrics_start(s->conf->metrics.listen, s->queue, &s->log, &s->metrics, err));
        s->tell_at = 0;
    }
    TRY(set_callback(s, s->conf, err));
    release_leftovers(s);
    TRY(control_open(s->event, control_path(s->conf, path), on_request, s, &s->control, err));
    s->env = (struct group_env){
        .event = s->event, .log = &s->log, .worker_program = s->worker_program, .release = release, .arg = s};
    TRY(watch_spot(s, err));
    TRY(watch_nodes(s, s->conf, err));
    return add_missing_groups(s, s->conf, err);
}

static void close_everything(struct supervisor *s)
{
    for (int i = 0; i < s->n_groups; i++)
        group_free(s->groups[i]);
    free((void *)s->groups);
    control_close(s->control);
    metrics_stop(s->metrics);
    spot_stop(s->spot);
    callback_stop(s->callback);
    gatherer_stop(s->gatherer);
    queue_thread_stop(s->queue);
    sd_event_source_disable_unref(s->timer);
    sd_event_unref(s->event);
    if (s->lock_fd >= 0)
        close(s->lock_fd);
    conf_free(s->conf);
}

int supervisor_check(const struct conf *conf, struct err *err)
{
    char path[PATH_MAX];
    struct stat st;
    TRY(find_worker(conf, path, err));
    if (*conf->callback.secret_file)
        TRY(callback_check(conf, err));
    TRY(check_moderation(conf, err));
    for (int i = 0; i < conf->n_groups; i++)
        for (int m = 0; m < conf->groups[i].model.count; m++) {
            const char *directory = conf->groups[i].models[m].directory;
            if (stat(directory, &st) != 0 || !S_ISDIR(st.st_mode))
                return err_set(err, ERR_NOT_FOUND, "%s: [group %s] model: %s: no directory there", conf->path,
                               conf->groups[i].name, directory);
        }
    return 0;
}

int supervisor_run(struct conf *conf, struct err *err)
{
    struct supervisor s = {.conf = conf,
                           .log = {.fd = 2, .level = (enum log_level)conf->log.level, .prog = "supervisor", .rank = -1},
                           .lock_fd = -1,
                           .tell_at = INFINITY,
                           .exit_at = INFINITY};
    int rc = open_everything(&s, err);
    if (rc == 0) {
        log_line(&s.log, LOG_INFO, "supervisor.start", "node=%s pid=%d groups=%d role=%s", conf->fleet.node,
                 (int)getpid(), conf->n_groups, conf->n_groups ? "workers" : "queue");
        tidy(&s);
        int ended = sd_event_loop(s.event);
        if (ended < 0)
            rc = err_set(err, ERR_IO, "the event loop failed: %s", strerror(-ended));
        log_line(&s.log, LOG_INFO, "supervisor.end", "releases_pending=%u", s.redis.pending);
    }
    close_everything(&s);
    return rc;
}

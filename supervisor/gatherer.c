#include "supervisor/gatherer.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "proto/clock.h"

enum { CONNECT_MS = 2000, COMMAND_MS = 2000 };
#define REPORT_SECONDS 0.25 // well below what counts as silence in gather.lua and span.c

// A group, as the loop told it last and as Redis did.
struct entry {
    struct entry *next;
    struct span_nodes of;
    struct gather_node mine;
    bool changed, gone; // mine has not gone out yet; the loop has no use for it any more
    bool heard;         // view answers mine
    struct gather_view view;
};

struct gatherer {
    pthread_t thread;
    struct log log;
    char *url, *queue_name;
    int fd; // eventfd
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    // under the mutex
    bool stop;
    struct entry *entries;
    // of the thread alone
    struct queue *queue;
    bool down;
};

// ---- the thread

static void report_redis(struct gatherer *g, int rc, const struct err *err)
{
    if (rc != 0 && !g->down)
        log_line(&g->log, LOG_WARN, "nodes.unheard", "error=\"%s\"", err->text);
    g->down = rc != 0;
}

static int report(struct gatherer *g, const struct entry *e, struct gather_view *out, struct err *err)
{
    const struct redis_options options = {.connect_ms = CONNECT_MS, .command_ms = COMMAND_MS};
    const char *names[CONF_MAX_NODES];
    for (int i = 0; i < e->of.n_nodes; i++)
        names[i] = e->of.nodes[i].name;
    if (!g->queue)
        TRY(queue_open(&g->queue, g->url, g->queue_name, QUEUE_NODE, &options, err));
    return gather(g->queue, e->of.group, names, e->of.n_nodes, e->of.me, &e->mine, out, err);
}

// What came back counts, unless the loop has said something else meanwhile.
static void deliver(struct gatherer *g, struct entry *e, struct gather_view *view)
{
    const uint64_t one = 1;
    if (e->changed) {
        gather_view_free(view);
        return;
    }
    gather_view_free(&e->view);
    e->view = *view;
    e->heard = true;
    const ssize_t ignored = write(g->fd, &one, sizeof one); // full means readable already
    (void)ignored;
}

// Every group once. The mutex is held but for the calls, over which entries may be appended and what they say may
// change, so a copy is sent; only this thread takes them out.
static void report_all(struct gatherer *g, struct entry *sent)
{
    for (struct entry **at = &g->entries, *e; (e = *at) != NULL;) {
        struct err err = {0};
        struct gather_view view = {0};
        *sent = *e;
        e->changed = false;
        pthread_mutex_unlock(&g->mutex);
        const int rc = report(g, sent, &view, &err);
        report_redis(g, rc, &err);
        pthread_mutex_lock(&g->mutex);
        if (rc == 0)
            deliver(g, e, &view);
        if (sent->gone) { // that was its last word
            *at = e->next;
            gather_view_free(&e->view);
            free(e);
        } else {
            at = &e->next;
        }
    }
}

static bool is_news(const struct gatherer *g)
{
    for (const struct entry *e = g->entries; e; e = e->next)
        if (e->changed)
            return true;
    return false;
}

static void *run(void *arg)
{
    struct gatherer *g = arg;
    struct entry *sent = calloc(1, sizeof *sent);
    pthread_mutex_lock(&g->mutex);
    while (sent && !g->stop) {
        const double until = monotonic_seconds() + REPORT_SECONDS;
        const struct timespec at = {.tv_sec = (time_t)until, .tv_nsec = (long)(1e9 * (until - (double)(time_t)until))};
        report_all(g, sent);
        while (!g->stop && (g->down || !is_news(g)) && monotonic_seconds() < until)
            pthread_cond_timedwait(&g->wake, &g->mutex, &at);
    }
    if (sent && is_news(g) && !g->down) // the others need not find out
        report_all(g, sent);
    pthread_mutex_unlock(&g->mutex);
    queue_close(g->queue);
    free(sent);
    return NULL;
}

// ---- what the loop calls

static void free_gatherer(struct gatherer *g)
{
    for (struct entry *e = g->entries, *next; e; e = next) {
        next = e->next;
        gather_view_free(&e->view);
        free(e);
    }
    if (g->fd >= 0)
        close(g->fd);
    pthread_cond_destroy(&g->wake);
    pthread_mutex_destroy(&g->mutex);
    free(g->url);
    free(g->queue_name);
    free(g);
}

int gatherer_start(const struct conf *conf, const struct log *log, struct gatherer **out, struct err *err)
{
    pthread_condattr_t monotonic;
    struct gatherer *g = calloc(1, sizeof *g);
    if (!g)
        return err_set(err, ERR_NO_MEMORY, "no memory for a thread that hears other nodes");
    g->log = *log;
    pthread_mutex_init(&g->mutex, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&g->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    g->url = strdup(conf->redis.url);
    g->queue_name = strdup(conf->redis.queue);
    g->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    const int rc = g->url && g->queue_name && g->fd >= 0 ? pthread_create(&g->thread, NULL, run, g) : ENOMEM;
    if (rc != 0) {
        free_gatherer(g);
        return err_set(err, ERR_NO_MEMORY, "cannot start a thread that hears other nodes: %s", strerror(rc));
    }
    *out = g;
    return 0;
}

void gatherer_stop(struct gatherer *g)
{
    if (!g)
        return;
    pthread_mutex_lock(&g->mutex);
    g->stop = true;
    pthread_cond_signal(&g->wake);
    pthread_mutex_unlock(&g->mutex);
    pthread_join(g->thread, NULL);
    free_gatherer(g);
}

// Under the mutex.
static struct entry *find(struct gatherer *g, const char *group)
{
    for (struct entry *e = g->entries; e; e = e->next)
        if (!e->gone && strcmp(e->of.group, group) == 0)
            return e;
    return NULL;
}

static struct entry *find_or_add(struct gatherer *g, const char *group)
{
    struct entry *e = find(g, group), **last = &g->entries;
    if (e || !(e = calloc(1, sizeof *e)))
        return e;
    snprintf(e->of.group, sizeof e->of.group, "%s", group);
    e->changed = true;
    while (*last)
        last = &(*last)->next;
    return *last = e;
}

void gatherer_say(struct gatherer *g, const struct span_nodes *group, const struct gather_node *mine)
{
    pthread_mutex_lock(&g->mutex);
    struct entry *e = find_or_add(g, group->group);
    if (e) { // else: no memory; it is said again soon
        e->of = *group;
        if (!gather_same(&e->mine, mine)) {
            e->mine = *mine;
            e->changed = true;
            e->heard = false; // what came before answers something else
        }
        if (e->changed)
            pthread_cond_signal(&g->wake);
    }
    pthread_mutex_unlock(&g->mutex);
}

void gatherer_forget(struct gatherer *g, const char *group)
{
    pthread_mutex_lock(&g->mutex);
    struct entry *e = find(g, group);
    if (e) {
        e->mine = (struct gather_node){.phase = GATHER_AWAY, .reason = "the group is no more on this node"};
        e->changed = e->gone = true;
        pthread_cond_signal(&g->wake);
    }
    pthread_mutex_unlock(&g->mutex);
}

bool gatherer_hear(struct gatherer *g, const char *group, const struct gather_node *mine, struct gather_view *view)
{
    pthread_mutex_lock(&g->mutex);
    struct entry *e = find(g, group);
    const bool heard = e && e->heard && gather_same(&e->mine, mine);
    if (heard) {
        *view = e->view;
        e->view = (struct gather_view){0};
        e->heard = false;
    }
    pthread_mutex_unlock(&g->mutex);
    return heard;
}

int gatherer_fd(const struct gatherer *g)
{
    return g->fd;
}

void gatherer_rest(struct gatherer *g)
{
    uint64_t count;
    while (read(g->fd, &count, sizeof count) > 0)
        ;
}

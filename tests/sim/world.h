// world.h: what world.c (server, time, faults) and actors.c (who uses the queue) share; sim.h is what others see.
#ifndef DITFLEET_SIM_WORLD_H
#define DITFLEET_SIM_WORLD_H

#include "check.h"
#include "random.h"
#include "server.h"
#include "sim.h"

#include "proto/queue.h"

enum {
    WORKERS = 4,
    HELD_MAX = 4,
    NODES = 2,
    CALLBACKS = 4,
    RELEASES = 64,
    ACTORS = 24,
    DEPTH = 3, // how deep actors may act in the middle of each other's calls
    LATE = 16,
};

struct world;
struct actor;
typedef void actor_function(struct world *w, struct actor *a);

struct actor {
    const char *kind;
    unsigned index;            // of its kind
    actor_function *act, *die; // die: what it knew is gone; it starts anew
    struct queue *q;
    bool busy, doomed; // doomed: killed in the middle of a call
    int64_t stalled_until_us;
    char name[24];
};

// A worker's memory; its herald sees it too.
struct held_job {
    struct queue_fence fence;
    unsigned phase;
    bool lost; // the herald was told so
};
struct worker {
    unsigned incarnation;
    struct held_job held[HELD_MAX];
    size_t n;
};

struct node { // a supervisor's memory: whose jobs it has yet to give back
    struct {
        unsigned worker, incarnation;
    } release[RELEASES];
    size_t n;
    int64_t reap_at_us;
};

struct caller {
    struct queue_callback list[CALLBACKS];
    size_t n;
};

struct late_request { // its sender gave up; it lies in a socket's buffer
    size_t argc;
    struct text *argv;
};

struct world {
    const struct sim_options *options;
    struct sim_counts counts;
    uint64_t random;
    struct server *server;
    bool functions; // the server knows functions
    struct check *check;
    char sha1[41];
    int64_t server_us, monotonic_us;
    bool calm; // nothing goes wrong any more, and nothing new begins
    struct actor actors[ACTORS];
    size_t n_actors;
    struct actor *stack[DEPTH];
    size_t depth;
    struct worker workers[WORKERS];
    struct node nodes[NODES];
    struct caller callers[NODES];
    struct job_plan {
        uint64_t deadline_ms, not_before_ms;
    } plans[CHECK_JOBS];
    unsigned n_jobs;
    struct store_copy *copy; // where a replica stopped following
    struct check_copy *check_copy;
    struct late_request late[LATE];
    size_t n_late;
};

static inline unsigned draw(struct world *w, unsigned n)
{
    return random_below(&w->random, n);
}

static inline bool once_in(struct world *w, unsigned n)
{
    return random_once_in(&w->random, n);
}

static inline int64_t server_ms(const struct world *w)
{
    return w->server_us / 1000;
}

void world_trace(struct world *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
void world_kill(struct world *w, struct actor *a);
struct actor *world_actor(struct world *w, const char *kind, unsigned index);

// Makes all actors.
void actors_make(struct world *w);

#endif

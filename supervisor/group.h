// group.h: a group of worker processes that live and die together.
//
//   STOPPED --start--> STARTING --every rank READY--> READY
//   STOPPED --start, the group spans nodes--> GATHERING --all nodes offer--> STARTING
//   STARTING|READY|DRAINING --a rank exits, hangs, is silent, breaks the protocol--> KILLING (SIGKILL to all, jobs
//   released) KILLING --last rank gone--> BACKOFF --time--> STARTING,   or FAILED (exit status 125),   or STOPPED (told
//   to stop) STARTING|READY --drain--> DRAINING --last rank gone--> STOPPED;   grace over: KILLING
//
// Of a group that spans nodes this is the life of its ranks on this node; what the others' supervisors say of theirs
// comes by group_hear, and this one's state goes to them by group_report. Ranks that are lost anywhere are an end
// everywhere, and so is a drain.
//
// Nothing here blocks or touches Redis: jobs are handed to env->release. A group never frees itself.
#ifndef DITFLEET_SUPERVISOR_GROUP_H
#define DITFLEET_SUPERVISOR_GROUP_H

#include <jansson.h>
#include <stdbool.h>
#include <sys/types.h>
#include <systemd/sd-event.h>

#include "proto/conf.h"
#include "proto/msg.h"
#include "supervisor/span.h"

struct group;

enum group_state {
    GROUP_STOPPED,
    GROUP_GATHERING,
    GROUP_STARTING,
    GROUP_READY,
    GROUP_DRAINING,
    GROUP_KILLING,
    GROUP_BACKOFF,
    GROUP_FAILED,
    GROUP_STATES
};
const char *group_state_name(enum group_state state);

// What every group of a supervisor shares. Outlives them all.
struct group_env {
    sd_event *event;
    const struct log *log;
    const char *worker_program; // absolute path
    // The jobs that this incarnation of worker holds go back to the queue; must not block.
    void (*release)(void *arg, const char *worker, const char *incarnation, const struct err *why);
    void *arg;
};

// *conf and its group named name must live until the next group_configure or group_free.
int group_new(const struct group_env *env, const struct conf *conf, const char *name, struct group **out,
              struct err *err);
// Kills what still runs, without waiting.
void group_free(struct group *g);

// Swaps the configuration. conf may have no group of this name any more: then the group stops. What its workers read
// changed, or it had failed: it is drained and formed anew. Otherwise nothing happens to it.
void group_configure(struct group *g, const struct conf *conf);

void group_start(struct group *g); // also ends FAILED, and brings back what was drained
void group_drain(struct group *g); // and stay STOPPED
void group_kill(struct group *g);  // at once, and stay STOPPED

// Whether pid was one of its ranks; status as of waitpid.
bool group_child_exited(struct group *g, pid_t pid, int status);

// When it wants group_tick to be called (seconds, CLOCK_MONOTONIC); INFINITY: never.
double group_next(const struct group *g);
// Acts on what is due by now: hung ranks, the end of a backoff or of the grace time.
void group_tick(struct group *g, double now);

// Of a group that spans nodes: who they are, what the others are to hear, and what they say.
const struct span_nodes *group_nodes(const struct group *g); // NULL: it does not span any
void group_report(const struct group *g, struct gather_node *out);
void group_hear(struct group *g, const struct gather_view *view, double now);

const char *group_name(const struct group *g);
enum group_state group_state(const struct group *g);
bool group_orphaned(const struct group *g); // its configuration is gone: free it once STOPPED
bool group_settled(const struct group *g);  // has been READY, or has failed, or is stopped
json_t *group_status(const struct group *g);

// What is counted of a group; ranks that are no process are in none of the stages.
struct group_numbers {
    char name[64];
    enum group_state state;
    unsigned restarts;
    unsigned ranks;            // of the incarnation that runs or ran last
    unsigned stage[STAGES];    // living ranks by the stage that their last beat told
    double busy_s, lifetime_s; // seconds of all ranks since the supervisor's start: computing for jobs; alive
};
void group_numbers(const struct group *g, struct group_numbers *out);

#endif

// job_run.h: THE path of a job through a worker group. Rank 0 leads: it claims, tells the others, and hands the pixels
// on; the others follow until it says stop.
#ifndef DITFLEET_JOB_RUN_H
#define DITFLEET_JOB_RUN_H

#include "proto/conf.h"
#include "worker/engine.h"
#include "worker/pulse.h"

// One process of a worker group, set up by main.c.
struct worker {
    const struct conf *conf;
    const struct conf_group *group;
    const struct log *log;
    struct pulse *pulse;
    struct comm *comm;
    const struct kernels *kernels;
    struct precision precision; // of every job
    struct engine *engine;
    struct model **models;   // (group->model.count), beside group->models
    const char *incarnation; // new at each start of the group
    char id[CONF_WORKER_ID_BYTES];
    bool serving; // it was ready: what goes wrong from here on need not go wrong again
};

// The plan that the group's configuration asks for, 0 where it leaves it open.
int worker_plan(const struct conf_group *g, struct plan *out, struct err *err);

// A picture through every model, on all ranks: pages, threads and buffers are there afterwards. On a GPU it has the
// model's default size, where that fits: then algorithms are chosen and memory is taken before the first job.
int worker_warm_up(struct worker *w, struct err *err);

// Until drained: 0. Anything else: the process is to exit, and the supervisor to start the group anew.
int worker_lead(struct worker *w, struct err *err);   // rank 0
int worker_follow(struct worker *w, struct err *err); // the others

#endif

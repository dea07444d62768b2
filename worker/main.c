// ditfleet-worker: one rank of a worker group. Started by the supervisor, which passes as file descriptors the control
// socket and the region of shared memory, or of a group that spans nodes where its ranks meet; see proto/msg.h for what
// they say to each other.
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/backend.h"
#include "worker/job_run.h"

struct arguments {
    const char *config, *group, *incarnation;
    long rank, ranks, control_fd, shm_fd, meeting_fd, listen_fd;
};

static bool parse_number(const char *text, long max, long *out)
{
    char *end;
    *out = strtol(text, &end, 10);
    return end != text && *end == '\0' && *out >= 0 && *out <= max;
}

static int parse_arguments(int argc, char **argv, struct arguments *a)
{
    static const struct option options[] = {
        {"config", required_argument, NULL, 'c'},      {"group", required_argument, NULL, 'g'},
        {"incarnation", required_argument, NULL, 'i'}, {"rank", required_argument, NULL, 'r'},
        {"ranks", required_argument, NULL, 'n'},       {"control-fd", required_argument, NULL, 'f'},
        {"shm-fd", required_argument, NULL, 's'},      {"meeting-fd", required_argument, NULL, 'm'},
        {"listen-fd", required_argument, NULL, 'l'},   {NULL, 0, NULL, 0},
    };
    bool ok = true;
    *a = (struct arguments){.rank = -1, .ranks = -1, .control_fd = -1, .shm_fd = -1, .meeting_fd = -1, .listen_fd = -1};
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;)
        switch (c) {
        case 'c':
            a->config = optarg;
            break;
        case 'g':
            a->group = optarg;
            break;
        case 'i':
            a->incarnation = optarg;
            break;
        case 'r':
            ok &= parse_number(optarg, COMM_MAX_RANKS - 1, &a->rank);
            break;
        case 'n':
            ok &= parse_number(optarg, COMM_MAX_RANKS, &a->ranks);
            break;
        case 'f':
            ok &= parse_number(optarg, 1 << 20, &a->control_fd);
            break;
        case 's':
            ok &= parse_number(optarg, 1 << 20, &a->shm_fd);
            break;
        case 'm':
            ok &= parse_number(optarg, 1 << 20, &a->meeting_fd);
            break;
        case 'l':
            ok &= parse_number(optarg, 1 << 20, &a->listen_fd);
            break;
        default:
            ok = false;
        }
    const bool one_way = (a->shm_fd >= 0) != (a->meeting_fd >= 0) && (a->meeting_fd >= 0) == (a->listen_fd >= 0);
    if (ok && optind == argc && a->config && a->group && a->incarnation && a->control_fd >= 0 && one_way &&
        a->rank >= 0 && a->rank < a->ranks)
        return 0;
    fprintf(stderr, "usage: ditfleet-worker --config FILE --group NAME --rank R --ranks N --incarnation HEX "
                    "--control-fd FD {--shm-fd FD | --meeting-fd FD --listen-fd FD}\n(started by ditfleet-supervisor; "
                    "to make one picture without a "
                    "fleet: ditfleet generate)\n");
    return EXIT_DO_NOT_RESTART;
}

// The supervisor is gone: nobody would restart, drain or watch this process. Its jobs come back when the leases end.
static void on_orphaned(void *arg)
{
    (void)arg;
    _exit(EXIT_FAILURE);
}

// SIGTERM waits for the pulse, in whichever thread it arrives.
static void set_signals(void)
{
    sigset_t drain;
    sigemptyset(&drain);
    sigaddset(&drain, SIGTERM);
    sigprocmask(SIG_BLOCK, &drain, NULL);
    signal(SIGINT, SIG_IGN); // Ctrl-C reaches the whole foreground group; the supervisor decides
    signal(SIGPIPE, SIG_IGN);
}

// As the group says, else as its models prefer, who have to agree: all of them share an engine.
static int choose_precision(struct worker *w, struct err *err)
{
    const struct conf_group *g = w->group;
    Ditfleet__V1__Precision wanted = (Ditfleet__V1__Precision)g->precision, preferred = wanted;
    const bool asked = wanted == DITFLEET__V1__PRECISION__PRECISION_DEFAULT && g->device == CONF_DEVICE_CUDA;
    for (int i = 0; asked && i < g->model.count; i++) {
        struct model *m; // what it says of itself; its weights stay unread
        TRY(model_load(g->models[i].directory, &m, err));
        const Ditfleet__V1__Precision prefers = m->limits.precision;
        model_free(m);
        if (i > 0 && prefers != preferred)
            return err_set(err, ERR_INVALID,
                           "[group %s] %s@%s asks for precision %s and %s@%s for %s; say precision = in the group, or "
                           "give each a group",
                           g->name, g->models[0].name, g->models[0].version, job_precision_name(preferred),
                           g->models[i].name, g->models[i].version, job_precision_name(prefers));
        preferred = prefers;
    }
    return precision_of(w->kernels, wanted, preferred, &w->precision, err);
}

// With the ranks of this host, or of all nodes that the group spans.
static int join_ranks(struct worker *w, const struct arguments *a, struct err *err)
{
    struct comm_tcp_meeting where;
    if (a->meeting_fd < 0)
        return comm_shm_attach((int)a->shm_fd, (int)a->rank, &w->comm, err);
    if (pread((int)a->meeting_fd, &where, sizeof where, 0) != (ssize_t)sizeof where)
        return err_set(err, ERR_CORRUPT, "descriptor %ld holds no meeting of ranks; pass the supervisor's",
                       a->meeting_fd);
    const int rc =
        comm_tcp_join(&where, (int)a->listen_fd, (int)a->rank, (int)(w->conf->deadline.load_s * 1e3), &w->comm, err);
    close((int)a->listen_fd);
    return rc;
}

// Of the group's GPUs, which are all that a rank sees (CUDA_VISIBLE_DEVICES, from the supervisor), it has one.
static int open_engine(struct worker *w, const struct arguments *a, struct err *err)
{
    const bool cuda = w->group->device == CONF_DEVICE_CUDA;
    TRY(backend_find(cuda ? "cuda" : "cpu", &w->kernels, err));
    TRY(join_ranks(w, a, err));
    TRY(choose_precision(w, err));
    struct plan want, held;
    TRY(worker_plan(w->group, &want, err));
    TRY(plan_hold(&want, w->group->ranks, &held, err));
    const struct engine_options options = {.kernels = w->kernels,
                                           .device = {.threads = conf_group_threads(w->group),
                                                      .gpu = cuda ? (int)a->rank - w->group->first_rank : 0,
                                                      .activation = w->precision.activation,
                                                      .exact = w->group->exact != 0},
                                           .codes = w->precision.codes,
                                           .control = w->comm,
                                           .memory_budget = w->group->memory_budget,
                                           .held = held,
                                           .ranks_here = w->group->local_ranks,
                                           .tuned = w->group->n_nodes == 0}; // prices are of one machine
    const int rc = engine_new(&options, &w->engine, err);
    if (rc != 0 && cuda)
        err_context(err, "gpu %d of group %s", w->group->gpus[a->rank - w->group->first_rank], w->group->name);
    return rc;
}

// Nodes may have been given different files under one name.
static int compare_models(struct worker *w, struct err *err)
{
    const int ranks = comm_size(w->comm), me = comm_rank(w->comm);
    char all[COMM_MAX_RANKS][sizeof w->models[0]->hash];
    int64_t counts[COMM_MAX_RANKS];
    for (int r = 0; r < ranks; r++)
        counts[r] = sizeof all[r];
    for (int i = 0; i < w->group->model.count; i++) {
        comm_all_gather(w->comm, w->models[i]->hash, all, counts);
        TRY(comm_check(w->comm, err));
        for (int r = 0; r < ranks; r++)
            if (memcmp(all[r], all[me], sizeof all[r]) != 0)
                return err_set(err, ERR_INVALID,
                               "%s@%s is another model to rank %d (hash %.16s) than to rank %d (%.16s): every node of "
                               "the group needs the same files",
                               w->group->models[i].name, w->group->models[i].version, r, all[r], me, all[me]);
    }
    return 0;
}

static int load_models(struct worker *w, struct err *err)
{
    w->models = calloc((size_t)w->group->model.count + 1, sizeof(struct model *));
    if (!w->models)
        return err_set(err, ERR_NO_MEMORY, "no memory for models");
    for (int i = 0; i < w->group->model.count; i++) {
        const struct home home = engine_home(w->engine); // of the memory that is free now
        const bool mapped = w->group->device == CONF_DEVICE_CPU && home.held.weights == PLAN_REPLICATED; // and shared
        pulse_report(w->pulse, STAGE_LOADING, (uint32_t)i, (uint32_t)w->group->model.count, "");
        TRY(model_load_on(w->group->models[i].directory, mapped ? NULL : &home, &w->models[i], err));
        log_line(w->log, LOG_INFO, "model.loaded", "model=%s@%s hash=%.16s device=%s precision=%s",
                 w->group->models[i].name, w->group->models[i].version, w->models[i]->hash, w->kernels->name,
                 precision_name(&w->precision));
    }
    return 0;
}

static void free_models(struct worker *w)
{
    for (int i = 0; w->models && i < w->group->model.count; i++)
        model_free(w->models[i]);
    free(w->models);
}

static int work(struct worker *w, const struct arguments *a, struct err *err)
{
    TRY(open_engine(w, a, err));
    TRY(load_models(w, err));
    if (w->group->n_nodes > 0)
        TRY(compare_models(w, err));
    TRY(worker_warm_up(w, err));
    pulse_report(w->pulse, STAGE_IDLE, 0, 0, "");
    pulse_ready(w->pulse);
    return a->rank == 0 ? worker_lead(w, err) : worker_follow(w, err);
}

// Failures that the next start would meet again: configuration, checkpoint, a library or a GPU that is not there. The
// rest may pass.
static int exit_status(int rc, const struct worker *w, const struct err *err)
{
    if (rc == 0)
        return EXIT_SUCCESS;
    return err->retryable || w->serving ? EXIT_FAILURE : EXIT_DO_NOT_RESTART;
}

// Before any thread: the log's level does not change afterwards.
static int configure(struct worker *w, const struct arguments *a, struct conf **conf, struct log *log, struct err *err)
{
    TRY(conf_load(a->config, conf, err));
    log->level = (enum log_level)(*conf)->log.level;
    w->conf = *conf;
    w->group = conf_group_find(*conf, a->group);
    if (!w->group)
        return err_set(err, ERR_NOT_FOUND, "%s has no [group %s]", a->config, a->group);
    conf_worker_id(*conf, a->group, w->id);
    return 0;
}

int main(int argc, char **argv)
{
    struct arguments a;
    struct err err = {.code = ERR_NONE}, no_pulse = {.code = ERR_NONE};
    struct conf *conf = NULL;
    int rc = parse_arguments(argc, argv, &a);
    if (rc != 0)
        return rc;
    struct log log = {.fd = 2, .level = LOG_INFO, .prog = "worker", .rank = (int)a.rank};
    struct worker w = {.log = &log, .incarnation = a.incarnation};
    set_signals();
    rc = configure(&w, &a, &conf, &log, &err);
    // A faulty configuration too is told to the supervisor.
    if (pulse_new((int)a.control_fd, &log, on_orphaned, NULL, &w.pulse, &no_pulse) != 0 && rc == 0) {
        err = no_pulse;
        rc = err.code;
    }
    if (rc == 0)
        rc = work(&w, &a, &err);
    if (rc != 0)
        log_line(&log, LOG_ERROR, "worker.failed", "code=%s error=\"%s\"", err_name(err.code), err.text);
    if (w.group)
        free_models(&w);
    engine_free(w.engine);
    comm_free(w.comm);
    pulse_free(w.pulse, rc == 0 ? "drained" : err.text);
    conf_free(conf);
    return exit_status(rc, &w, &err);
}

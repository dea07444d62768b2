// ranks.h: what tests of several ranks share: a group of processes (or threads) over shared memory that runs a job, and
// what its rank 0 was shown, which comes back through a mapping. Include <cmocka.h> first.
#ifndef DITFLEET_TESTS_RANKS_H
#define DITFLEET_TESTS_RANKS_H

#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/unit/demo.h"
#include "worker/comm/comm_internal.h"

enum { MAX_ENTRIES = 64, MAX_RANKS = 8, SLAB_BYTES = 1 << 20, PATIENCE_MS = 120000 };
#define RECORDED_BYTES ((size_t)64 << 20)

// What a group of ranks came to. Lives in memory that the ranks' processes share.
struct outcome {
    int rc[MAX_RANKS];
    struct err err[MAX_RANKS];
    struct plan plan;
    bool cut[4], direct; // direct: as in struct engine_result
    int entries;         // of what rank 0 was shown, in order
    struct {
        char name[40];
        int64_t at, count; // in values
    } entry[MAX_ENTRIES];
    int64_t used;
    size_t pixel_bytes;
    uint8_t *pixels; // behind the values
    float values[];
};

static inline struct outcome *outcome_new(void)
{
    struct outcome *o = mmap(NULL, RECORDED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(o != MAP_FAILED);
    return o;
}

static inline void outcome_free(struct outcome *o)
{
    munmap(o, RECORDED_BYTES);
}

static inline void record(void *arg, const char *name, struct tensor t)
{
    struct outcome *o = arg;
    if (t.dtype != DT_F32 || o->entries == MAX_ENTRIES ||
        (size_t)(o->used + tensor_count(t)) * sizeof(float) + sizeof *o > RECORDED_BYTES / 2)
        return; // comparing finds that it is missing
    snprintf(o->entry[o->entries].name, sizeof o->entry->name, "%s", name);
    o->entry[o->entries].at = o->used;
    o->entry[o->entries++].count = tensor_count(t);
    memcpy(o->values + o->used, t.data, tensor_bytes(t));
    o->used += tensor_count(t);
}

// ---- the model that all tests of a file share

static inline int ranks_set_up(void **state)
{
    *state = demo_model();
    return 0;
}

static inline int ranks_tear_down(void **state)
{
    model_free(*state);
    return 0;
}

// ---- a group of ranks

struct group {
    const struct model *model;
    const Ditfleet__V1__Job *job;
    struct plan want;              // ranks and degrees
    const struct kernels *kernels; // NULL: the CPU's; a GPU for each rank where they have memory of their own
    enum dtype activation, codes;  // of GPUs
    bool exact;
    bool apart;  // weights are had as plan_hold says, else all by every rank
    int stop_at; // not 0: before, the same job is stopped at that step
    struct outcome *outcome;
    int (*work)(const struct group *g, struct comm *comm, struct err *err);
    const struct outcome *replayed; // work == replay
    int region;
    void *mapping; // of the region, for ranks that are threads
    int64_t mapping_bytes;
};

static inline int stop(void *arg, enum engine_stage stage, int step, int steps, struct err *err)
{
    const struct group *g = arg;
    (void)steps;
    return stage == ENGINE_DENOISE && step == g->stop_at ? err_set(err, ERR_CANCELLED, "stopped") : 0;
}

static inline void ignore(void *arg, const char *name, struct tensor t)
{
    (void)arg, (void)name, (void)t;
}

static inline int run_stopped(const struct group *g, struct engine *e, const struct model *m, struct err *err)
{
    const struct engine_hooks hooks = {.progress = stop, .trace = ignore, .arg = (void *)g}; // it is only read
    struct engine_result none;
    struct err stopped;
    const int rc = engine_run(e, m, g->job, &g->want, &hooks, &none, &stopped);
    return rc == ERR_CANCELLED ? 0 : err_set(err, ERR_INTERNAL, "not stopped: %s", rc ? stopped.text : "it ended");
}

static inline int run_engine(const struct group *g, struct engine *e, const struct model *m, struct err *err)
{
    struct outcome *o = g->outcome;
    if (g->stop_at)
        TRY(run_stopped(g, e, m, err));
    const struct engine_hooks hooks = {.trace = record, .arg = o};
    struct engine_result result;
    const int rc = engine_run(e, m, g->job, &g->want, &hooks, &result, err);
    if (rc == 0 && result.pixels) {
        o->plan = result.plan;
        o->direct = result.direct;
        memcpy(o->cut, result.prompt_cut, sizeof o->cut);
        o->pixel_bytes = (size_t)g->job->num_images * g->job->width * g->job->height * 3;
        o->pixels = (uint8_t *)o + RECORDED_BYTES - o->pixel_bytes;
        memcpy(o->pixels, result.pixels, o->pixel_bytes);
    }
    engine_result_free(&result);
    return rc;
}

static inline int whole_job(const struct group *g, struct comm *comm, struct err *err)
{
    const struct kernels *k = g->kernels ? g->kernels : &kernels_cpu;
    struct plan held = {.weights = PLAN_REPLICATED};
    if (g->apart)
        TRY(plan_hold(&g->want, g->want.ranks, &held, err));
    const struct engine_options options = {.kernels = k,
                                           .device = {.threads = 1,
                                                      .gpu = k->memory ? comm_rank(comm) : 0,
                                                      .activation = g->activation,
                                                      .exact = g->exact},
                                           .codes = g->codes,
                                           .control = comm,
                                           .held = held};
    struct engine *e;
    struct model *placed = NULL;
    TRY(engine_new(&options, &e, err));
    const struct home home = engine_home(e);
    int rc = k->memory || g->apart ? model_load_on(DEMO_MODEL, &home, &placed, err) : 0;
    if (rc == 0)
        rc = run_engine(g, e, placed ? placed : g->model, err);
    model_free(placed);
    engine_free(e);
    return rc;
}

static inline int run_rank(const struct group *g, int rank)
{
    struct outcome *o = g->outcome;
    struct err *err = &o->err[rank];
    struct comm *comm = NULL;
    int rc = g->mapping ? comm_shm_attach_mapped(g->mapping, g->mapping_bytes, rank, &comm, err)
                        : comm_shm_attach(g->region, rank, &comm, err);
    if (rc == 0) {
        comm_set_timeout(comm, PATIENCE_MS);
        rc = g->work(g, comm, err);
        comm_free(comm);
    }
    return o->rc[rank] = rc;
}

static inline void run_group(struct group *g)
{
    struct err err = {.code = ERR_NONE};
    pid_t pid[MAX_RANKS] = {0};
    g->region = comm_shm_region(g->want.ranks, SLAB_BYTES, &err);
    assert_true(g->region >= 0);
    for (int r = 0; r < g->want.ranks; r++) {
        g->outcome->rc[r] = -1; // did not come back
        pid[r] = fork();
        assert_true(pid[r] >= 0);
        if (pid[r] == 0) {
            run_rank(g, r);
            _exit(0);
        }
    }
    for (int r = 0; r < g->want.ranks; r++)
        while (waitpid(pid[r], NULL, 0) < 0 && errno == EINTR)
            ;
    close(g->region);
}

struct thread_rank {
    const struct group *g;
    int rank;
    pthread_t thread;
};

static inline void *thread_main(void *arg)
{
    const struct thread_rank *t = arg;
    run_rank(t->g, t->rank);
    return NULL;
}

static inline void run_group_of_threads(struct group *g)
{
    struct thread_rank t[MAX_RANKS];
    struct err err = {.code = ERR_NONE};
    struct stat st;
    g->region = comm_shm_region(g->want.ranks, SLAB_BYTES, &err);
    assert_int_equal(fstat(g->region, &st), 0);
    g->mapping_bytes = st.st_size;
    g->mapping = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, g->region, 0);
    assert_true(g->mapping != MAP_FAILED);
    for (int r = 0; r < g->want.ranks; r++) {
        t[r] = (struct thread_rank){.g = g, .rank = r};
        assert_int_equal(pthread_create(&t[r].thread, NULL, thread_main, &t[r]), 0);
    }
    for (int r = 0; r < g->want.ranks; r++)
        pthread_join(t[r].thread, NULL);
    munmap(g->mapping, (size_t)g->mapping_bytes);
    close(g->region);
}

static inline void expect_success(const struct outcome *o, int ranks)
{
    for (int r = 0; r < ranks; r++)
        if (o->rc[r] != 0)
            fail_msg("rank %d: %d %s", r, o->rc[r], o->err[r].text);
}

// ---- against one rank

#define LAST_LATENTS "latents_after_step_"

static inline double limit_of(const char *name)
{
    return strncmp(name, LAST_LATENTS, strlen(LAST_LATENTS)) == 0 || strcmp(name, "vae_decoded") == 0 ? 1e-4 : 1e-5;
}

static inline const char *plan_text(const struct plan *p)
{
    static char text[PLAN_TEXT];
    plan_print(p, text);
    return text;
}

static inline double compare(const struct outcome *o, const struct outcome *one)
{
    double worst = 0;
    assert_int_equal(o->entries, one->entries);
    for (int i = 0; i < one->entries; i++) {
        const char *name = one->entry[i].name;
        assert_string_equal(o->entry[i].name, name);
        assert_int_equal(o->entry[i].count, one->entry[i].count);
        double found = relative_l2(o->values + o->entry[i].at, one->values + one->entry[i].at, one->entry[i].count);
        if (!(found <= limit_of(name)))
            fail_msg("%s: %s is %g off, allowed %g", plan_text(&o->plan), name, found, limit_of(name));
        worst = found > worst ? found : worst;
    }
    assert_int_equal(o->pixel_bytes, one->pixel_bytes);
    assert_int_equal(pixels_off(o->pixels, one->pixels, (int64_t)one->pixel_bytes / 3), 0);
    return worst;
}

// Without PipeFusion.
#define PLAN(ranks_, cfg_, ulysses_, ring_)                                                                            \
    {                                                                                                                  \
        .ranks = (ranks_), .cfg = (cfg_), .ulysses = (ulysses_), .ring = (ring_), .pipe = 1, .patches = 1, .data = 1   \
    }

#define FIELDS(...)                                                                                                    \
    (const char *const[])                                                                                              \
    {                                                                                                                  \
        __VA_ARGS__, NULL                                                                                              \
    }

// Ranks that are threads of one process: the job by many gives what it gives by few.
static inline void check_on_threads(const struct model *m, const Ditfleet__V1__Job *job, struct plan few,
                                    struct plan many)
{
    struct outcome *one = outcome_new(), *all = outcome_new();
    struct group g = {.model = m, .job = job, .want = few, .outcome = one, .work = whole_job};
    run_group_of_threads(&g);
    expect_success(one, few.ranks);
    g.want = many, g.outcome = all;
    run_group_of_threads(&g);
    expect_success(all, many.ranks);
    compare(all, one);
    outcome_free(one);
    outcome_free(all);
}

#endif

#include "worker/engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/clock.h"
#include "worker/engine_internal.h"
#include "worker/tuned.h"

enum { LINK_TIMEOUT_MS = 60000 };

int engine_agree(struct comm *control, int rc, struct err *err)
{
    const int ranks = comm_size(control);
    struct err all[COMM_MAX_RANKS];
    int64_t counts[COMM_MAX_RANKS];
    if (ranks == 1)
        return rc;
    struct err mine = {.code = ERR_NONE};
    if (rc != 0)
        mine = *err;
    for (int r = 0; r < ranks; r++)
        counts[r] = sizeof mine;
    comm_all_gather(control, &mine, all, counts);
    TRY(comm_check(control, err));
    for (int r = 0; r < ranks; r++)
        if (all[r].code != ERR_NONE)
            return err_set(err, all[r].code, "%s", all[r].text);
    return 0;
}

// The budget of a device with memory of its own.
static int open_residency(struct engine *e, int64_t budget, struct err *err)
{
    size_t available = 0, total = 0;
    if (!e->k->memory)
        return 0;
    e->k->memory(e->d, &available, &total);
    if (budget > (int64_t)total)
        return err_set(err, ERR_INVALID, "memory budget %.2f GiB: the device has %.2f GiB", (double)budget / (1 << 30),
                       (double)total / (1 << 30));
    TRY(residency_new(e->k, e->d, budget ? budget : (int64_t)available, &e->residency, err));
    residency_reserve(e->residency, ENGINE_LIBRARY_BYTES);
    return 0;
}

// Prices are rank 0's alone: files and free memory are not the same to all.
static void open_prices(struct engine *e, const struct engine_options *options)
{
    const struct precision precision = {.activation = options->device.activation, .codes = options->codes};
    struct tuned_key key;
    e->tuned = options->tuned && comm_size(e->control) > 1;
    if (!e->tuned || comm_rank(e->control) != 0)
        return;
    tuned_key_of(options->kernels, comm_size(e->control), options->device.threads, &precision, &key);
    e->priced = tuned_load(NULL, &key, &e->machine);
}

// Of several ranks all hear of a device that does not open: nobody waits for it.
static int open_device(struct engine *e, const struct device_options *options, struct err *err)
{
    int rc = e->k->open(options, &e->d, err);
    if (!e->k->link || comm_size(e->control) == 1)
        return rc;
    TRY(engine_agree(e->control, rc, err));
    return comm_link_new(e->control, e->k, e->d, LINK_TIMEOUT_MS, &e->data, err);
}

int engine_new(const struct engine_options *options, struct engine **out, struct err *err)
{
    *out = NULL;
    struct engine *e = calloc(1, sizeof *e);
    if (!e)
        return err_set(err, ERR_NO_MEMORY, "no memory for an engine");
    e->table = *options->kernels;
    e->table.activation = options->device.activation;
    e->k = &e->table;
    e->data = e->control = options->control;
    e->memory_limit = options->memory_limit;
    e->codes = options->codes;
    e->exact = options->device.exact;
    e->held = options->held;
    e->ranks_here = options->ranks_here ? options->ranks_here : comm_size(options->control);
    open_prices(e, options);
    int rc = open_device(e, &options->device, err);
    if (rc == 0)
        rc = open_residency(e, options->memory_budget, err);
    if (rc == 0)
        rc = prompt_cache_new(e->k, e->d, &e->cache, err);
    if (rc != 0) {
        engine_free(e);
        return rc;
    }
    *out = e;
    return 0;
}

void engine_free(struct engine *e)
{
    if (!e)
        return;
    if (e->data != e->control)
        comm_free(e->data);
    prompt_cache_free(e->cache);
    arena_free(e->arena);
    residency_free(e->residency);
    if (e->d)
        e->k->close(e->d);
    free(e);
}

struct home engine_home(const struct engine *e)
{
    struct home home = {.k = e->k, .d = e->d, .codes = e->codes, .residency = e->residency, .held = e->held};
    // Integers gained nothing by it (kernels/NOTES.md), and exact bits must not depend on a GPU's memory.
    home.twice = e->codes == DT_E4M3 && !e->exact && e->held.weights != PLAN_SHARDED;
    home.rank = comm_rank(e->data);
    if (!e->residency)
        home.room = engine_memory_share(e);
    return home;
}

struct comm_times engine_comm_times(const struct engine *e)
{
    return comm_times(e->data);
}

void engine_result_free(struct engine_result *r)
{
    free(r->pixels);
    r->pixels = NULL;
}

// ---- a job

// Rank 0 gets the pictures of the other parts of the group from their first ranks.
static void gather_pictures(const struct engine *e, const struct run *r, struct engine_result *out)
{
    const int me = comm_rank(e->control), parts = r->plan.data, ranks = r->plan.ranks / parts;
    const int64_t bytes = (int64_t)(r->job->num_images / (uint32_t)parts) * r->job->width * r->job->height * 3;
    int64_t sent[COMM_MAX_RANKS] = {0}, got[COMM_MAX_RANKS] = {0}, from[COMM_MAX_RANKS] = {0}, to[COMM_MAX_RANKS] = {0};
    if (parts == 1)
        return;
    if (me > 0 && me % ranks == 0) {
        sent[0] = bytes;
        from[0] = r->part_index * bytes;
    }
    for (int i = 1; me == 0 && i < parts; i++) {
        got[i * ranks] = bytes;
        to[i * ranks] = i * bytes;
    }
    comm_all_to_all(e->control, out->pixels, sent, from, out->pixels, got, to);
    if (me > 0)
        engine_result_free(out);
}

static int run_prepared(struct engine *e, struct run *r, struct engine_result *out, struct err *err)
{
    const Ditfleet__V1__Job *job = r->job;
    const size_t noise_bytes = (size_t)(job->num_images * r->image_tokens * r->model->info.channels) * sizeof(float);
    float *noise = malloc(noise_bytes);
    const bool keeps_pixels = comm_rank(e->data) % (r->plan.ranks / r->plan.data) == 0;
    if (keeps_pixels)
        out->pixels = malloc((size_t)job->num_images * job->width * job->height * 3);
    int rc = 0;
    if (!noise || (keeps_pixels && !out->pixels))
        rc = err_set(err, ERR_NO_MEMORY, "no memory for %u pictures of %u x %u", job->num_images, job->width,
                     job->height);
    if (rc == 0)
        rc = run_join(r, e->data, err);
    if (rc == 0)
        rc = make_pictures(r, noise, out, err);
    run_leave(r);
    if (rc == 0) {
        gather_pictures(e, r, out);
        rc = comm_check(e->control, err); // a part may have failed after the last word that all heard
    }
    free(noise);
    return rc;
}

// Memory that other ranks write is opened as it is for a job; it stays so while jobs are alike, as nothing is allocated
// for them.
static int close_memory(struct engine *e, const char *key, struct err *err)
{
    if (strcmp(e->opened, key) == 0)
        return 0;
    e->opened[0] = '\0';
    return comm_close_memory(e->data, err);
}

// Memory that comes and goes is not: sharded weights open theirs while a picture is denoised (ownership_show).
static int open_memory(struct engine *e, const struct model *m, const char *key, struct err *err)
{
    if (*e->opened)
        return 0;
    memcpy(e->opened, key, ENGINE_KEY);
    return comm_open_memory(e->data, !e->between && engine_held(m).weights != PLAN_SHARDED, err);
}

static int begin_run(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *want,
                     const struct engine_hooks *hooks, struct plan *plan, struct err *err)
{
    char key[ENGINE_KEY];
    engine_key(m, job, want, key);
    if (hooks->trace)
        snprintf(key + strlen(key), ENGINE_KEY - strlen(key), " traced");
    TRY(close_memory(e, key, err));
    TRY(engine_agree_on_plan(e, m, job, want, hooks, plan, err));
    return open_memory(e, m, key, err);
}

// Between jobs the arena holds nothing.
static void end_run(struct engine *e, struct engine_result *out)
{
    if (e->between)
        e->k->free(e->d, e->between);
    e->between = NULL;
    if (e->arena)
        arena_release(e->arena, 0);
    prompt_cache_drop(e->cache);
    if (e->residency)
        out->moves = residency_moves(e->residency);
}

// Where exchanges hold the waiting: the rank that others waited for has the least of them.
static void tell_waiting(struct rank_times *times, int ranks)
{
    double least = times[0].exchange;
    for (int r = 0; r < ranks; r++)
        if (times[r].wait > 0)
            return; // they were told apart
    for (int r = 1; r < ranks; r++)
        least = times[r].exchange < least ? times[r].exchange : least;
    for (int r = 0; r < ranks; r++) {
        times[r].wait = times[r].exchange - least;
        times[r].exchange = least;
    }
}

// Every rank's times of the job that began then.
static void share_times(const struct engine *e, double began, struct comm_times before, struct engine_result *out)
{
    const struct comm_times now = comm_times(e->data);
    struct rank_times mine = {.exchange = now.exchange - before.exchange, .wait = now.wait - before.wait};
    int64_t counts[COMM_MAX_RANKS];
    mine.compute = monotonic_seconds() - began - mine.exchange - mine.wait;
    for (int r = 0; r < out->plan.ranks; r++)
        counts[r] = sizeof mine;
    comm_all_gather(e->control, &mine, out->ranks, counts);
    if (comm_on_device(e->data))
        tell_waiting(out->ranks, out->plan.ranks);
}

int engine_run(struct engine *e, const struct model *m, const Ditfleet__V1__Job *job, const struct plan *want,
               const struct engine_hooks *hooks, struct engine_result *out, struct err *err)
{
    struct run r;
    const double began = monotonic_seconds();
    const struct comm_times before = comm_times(e->data);
    *out = (struct engine_result){0};
    if (e->residency)
        residency_moves(e->residency); // of this job from here on
    int rc = begin_run(e, m, job, want, hooks, &out->plan, err);
    if (rc != 0) {
        end_run(e, out);
        return rc;
    }
    run_init(&r, m, job, &out->plan);
    r.hooks = hooks;
    r.control = e->control;
    r.engine = e;
    r.residency = e->residency;
    r.cache = e->cache;
    run_use(&r, e->k, e->d, e->arena);
    rc = run_prepared(e, &r, out, err);
    out->direct = r.direct;
    out->idle_seconds = e->ended > 0 && r.begun > 0 ? r.begun - e->ended : 0;
    e->ended = monotonic_seconds();
    end_run(e, out);
    if (rc == 0) {
        share_times(e, began, before, out);
        rc = comm_check(e->control, err);
    }
    if (rc != 0) {
        if (!r.agreed) // the other ranks do not know: nobody may wait for this one
            comm_abort(e->control, err->text);
        engine_result_free(out);
    }
    return rc;
}

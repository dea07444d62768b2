// bench_run.c: the engine's own path, timed by its progress: what a job of a fleet goes through.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "ops/cli/bench.h"
#include "proto/clock.h"
#include "worker/sampler.h"

// One run under way.
struct watch {
    struct bench *b;
    double start, text, steps, end, done; // when the run began, its encoders, first step, decoding, and its end
    double exchange;                      // of the loop
    struct residency_moves moves;
    double after[SAMPLER_MAX_STEPS];  // when progress told of step i + 1
    int told;                         // steps told of
    enum engine_stage stop;           // the run ends before this stage, or, of ENGINE_DENOISE,
    int stop_step;                    // after this step
    bool stops, stopped, profile, on; // on: a profile is being taken
    enum engine_stage profile_stage;  // what to profile: from there
    int profile_step;                 // to the next report
};

static void add_op(void *arg, const char *name, double ms)
{
    struct bench_ops *ops = arg;
    int i = 0;
    while (i < ops->count && strcmp(ops->list[i].name, name) != 0)
        i++;
    if (i == BENCH_MAX_OPS)
        i--; // the last one collects what there is no room for
    else if (i == ops->count)
        snprintf(ops->list[ops->count++].name, BENCH_OP_NAME, "%s", name);
    ops->list[i].calls++;
    ops->list[i].ms += ms;
    ops->calls++;
    ops->ms += ms;
}

static int longest_first(const void *a, const void *b)
{
    const struct bench_op *x = a, *y = b;
    return (x->ms < y->ms) - (x->ms > y->ms);
}

void bench_ops_take(struct bench *b)
{
    b->k->profile_end(b->home.d, add_op, &b->ops);
    qsort(b->ops.list, (size_t)b->ops.count, sizeof *b->ops.list, longest_first);
}

static void end_profile(struct watch *w)
{
    if (w->on)
        bench_ops_take(w->b);
    w->on = false;
}

static double exchanged(const struct bench *b)
{
    const struct comm_times t = engine_comm_times(b->engine);
    return t.exchange + t.wait;
}

static int on_progress(void *arg, enum engine_stage stage, int step, int steps, struct err *err)
{
    struct watch *w = arg;
    const double now = monotonic_seconds();
    (void)steps;
    end_profile(w);
    if (stage == ENGINE_TEXT)
        w->text = now;
    if (stage == ENGINE_DENOISE && step == 0) {
        w->steps = now;
        w->exchange = exchanged(w->b);
    }
    if (stage == ENGINE_DENOISE && step > 0)
        w->after[w->told++] = now;
    if (stage == ENGINE_DECODE) {
        w->end = now;
        w->exchange = exchanged(w->b) - w->exchange;
    }
    if (step == 0 && w->b->n_images == 0) // later images are timed
        bench_memory_seen(w->b);
    if (w->stops && stage == w->stop && step == w->stop_step) {
        w->stopped = true;
        return err_set(err, ERR_CANCELLED, "measured");
    }
    if (w->profile && stage == w->profile_stage && step == w->profile_step) {
        w->b->k->profile_start(w->b->home.d);
        w->on = true;
    }
    return 0;
}

void bench_memory_seen(struct bench *b)
{
    struct rusage usage;
    size_t available = 0, total = 0;
    getrusage(RUSAGE_SELF, &usage);
    b->memory.process = (int64_t)usage.ru_maxrss * 1024;
    if (!b->k->memory)
        return;
    b->k->memory(b->home.d, &available, &total);
    const int64_t used = (int64_t)(total - available);
    b->memory.total = (int64_t)total;
    if (used > b->memory.peak)
        b->memory.peak = used;
}

static int run(struct watch *w, const Ditfleet__V1__Job *job, struct err *err)
{
    const struct engine_hooks hooks = {.progress = on_progress, .arg = w};
    struct engine_result result;
    w->start = monotonic_seconds();
    int rc = engine_run(w->b->engine, w->b->model, job, &w->b->want, &hooks, &result, err);
    w->done = monotonic_seconds();
    end_profile(w);
    w->moves = result.moves;
    w->b->direct = result.direct;
    if (rc != 0 && w->stopped) {
        *err = (struct err){.code = ERR_NONE};
        if (w->b->home.residency)
            w->moves = residency_moves(w->b->home.residency);
        return 0;
    }
    if (rc == 0)
        engine_result_free(&result);
    return rc;
}

// Milliseconds of each step from the times of the reports. A device that works on its own is one step behind them: the
// report of step i comes when step i - 1 is done, and decoding begins when all are.
static struct bench_spread step_times(const struct bench *b, const struct watch *w, double end)
{
    double ms[SAMPLER_MAX_STEPS];
    const bool behind = b->k->pace != b->k->sync;
    for (int i = 0; i < w->told; i++) {
        const double from = i == 0 ? w->steps : w->after[behind ? i : i - 1];
        const double to = !behind ? w->after[i] : i + 1 < w->told ? w->after[i + 1] : end;
        ms[i] = (to - from) * 1e3;
    }
    return bench_spread_of(ms, w->told);
}

static struct bench_image image_of(const struct bench *b, const struct watch *w)
{
    return (struct bench_image){.plan = w->text - w->start,
                                .text = w->steps - w->text,
                                .loop = w->end - w->steps,
                                .decode = w->stopped ? 0 : w->done - w->end,
                                .whole = (w->stopped ? w->end : w->done) - w->start,
                                .loaded = w->moves.loaded_bytes,
                                .load = w->moves.load_seconds,
                                .exchange = w->exchange,
                                .step = step_times(b, w, w->end)};
}

int bench_images(struct bench *b, int count, struct err *err)
{
    char *const prompt = b->job->prompt;
    int rc = 0;
    for (int i = 0; rc == 0 && i < count && b->n_images < BENCH_MAX_REPEAT; i++) {
        char text[64]; // another prompt for each: the engine remembers those that it encoded
        struct watch w = {.b = b, .stop = ENGINE_DECODE, .stops = b->what == BENCH_STEP};
        snprintf(text, sizeof text, "%.40s, picture %d", prompt ? prompt : "", b->n_images);
        b->job->prompt = text;
        rc = run(&w, b->job, err);
        if (rc == 0)
            b->images[b->n_images++] = image_of(b, &w);
    }
    b->job->prompt = prompt;
    bench_memory_seen(b);
    return rc;
}

double bench_process_seconds(void)
{
    unsigned long long began = 0;
    struct timespec now;
    char text[2048];
    FILE *f = fopen("/proc/self/stat", "re");
    const size_t n = f ? fread(text, 1, sizeof text - 1, f) : 0;
    if (f)
        fclose(f);
    text[n] = '\0';
    const char *after = strrchr(text, ')'); // the name before it may hold anything
    for (int field = 2; after && field < 22; field++)
        after = strchr(after + 1, ' ');
    clock_gettime(CLOCK_BOOTTIME, &now);
    if (!after || sscanf(after, "%llu", &began) != 1)
        return 0;
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec - (double)began / (double)sysconf(_SC_CLK_TCK);
}

int bench_start(struct bench *b, struct err *err)
{
    struct watch w = {.b = b, .stops = true, .stop = ENGINE_DENOISE, .stop_step = 1};
    Ditfleet__V1__Job job = *b->job;
    TRY(run(&w, &job, err));
    TRY(b->k->sync(b->home.d, err)); // the report may have come before the step was done
    b->first_step = bench_process_seconds();
    return 0;
}

int bench_profile(struct bench *b, struct err *err)
{
    Ditfleet__V1__Job job = *b->job;
    if (!b->k->profile_start || b->what == BENCH_TEXT) // text was profiled as it was timed
        return 0;
    const bool decode = b->what == BENCH_VAE;
    job.num_inference_steps = decode ? 1 : job.num_inference_steps < 3 ? job.num_inference_steps : 3;
    struct watch w = {.b = b,
                      .profile = true,
                      .profile_stage = decode ? ENGINE_DECODE : ENGINE_DENOISE,
                      .profile_step = !decode && job.num_inference_steps > 1,
                      .stops = !decode,
                      .stop = ENGINE_DECODE};
    return run(&w, &job, err);
}

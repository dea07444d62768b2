// bench_error.c: what a precision costs: the same picture in it and in float32, from the same noise, step by step.
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ops/cli/bench.h"
#include "ops/cli/json.h"
#include "worker/sampler.h"

// What a run predicted at each step, and its latents after it.
struct record {
    float *predictions, *latents; // (steps, values)
    int64_t values;
    int steps;
};

static void note(const struct record *r, float *to, const char *name, const char *prefix, struct tensor t)
{
    const size_t length = strlen(prefix);
    const int step = strncmp(name, prefix, length) == 0 ? atoi(name + length) : -1;
    if (step >= 0 && step < r->steps && tensor_count(t) == r->values)
        memcpy(to + step * r->values, t.data, (size_t)r->values * sizeof *to);
}

static void on_trace(void *arg, const char *name, struct tensor data)
{
    const struct record *r = arg;
    note(r, r->predictions, name, "noise_pred_step_", data);
    note(r, r->latents, name, "latents_after_step_", data);
}

// Pixels are not asked for.
static int on_progress(void *arg, enum engine_stage stage, int step, int steps, struct err *err)
{
    (void)arg, (void)step, (void)steps;
    return stage == ENGINE_DECODE ? err_set(err, ERR_CANCELLED, "measured") : 0;
}

static int run(struct bench *b, struct record *r, struct err *err)
{
    const struct engine_hooks hooks = {.progress = on_progress, .trace = on_trace, .arg = r};
    struct engine_result result;
    const int64_t side = b->model->side_multiple;
    r->steps = (int)b->job->num_inference_steps;
    r->values = b->job->width / side * (b->job->height / side) * b->model->info.channels;
    r->predictions = calloc((size_t)(r->steps * r->values), sizeof *r->predictions);
    r->latents = calloc((size_t)(r->steps * r->values), sizeof *r->latents);
    if (!r->predictions || !r->latents)
        return err_set(err, ERR_NO_MEMORY, "no memory for the latents of %d steps", r->steps);
    const int rc = engine_run(b->engine, b->model, b->job, &b->want, &hooks, &result, err);
    if (rc == 0)
        engine_result_free(&result);
    if (rc != ERR_CANCELLED)
        return rc;
    *err = (struct err){.code = ERR_NONE};
    return 0;
}

// ||a - b|| / ||b||; what is not finite stays so.
static double apart(const float *a, const float *b, int64_t n)
{
    double difference = 0, all = 0;
    for (int64_t i = 0; i < n; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        all += (double)b[i] * (double)b[i];
    }
    return sqrt(difference / all);
}

static void compare(struct bench *b, const struct record *a, const struct record *exact)
{
    for (int i = 0; i < exact->steps; i++) {
        const int64_t at = i * exact->values;
        b->errors[i] = (struct bench_error){apart(a->predictions + at, exact->predictions + at, exact->values),
                                            apart(a->latents + at, exact->latents + at, exact->values)};
    }
    b->n_errors = exact->steps;
}

static int run_both(struct bench *b, struct record two[2], struct err *err)
{
    const struct precision asked = b->precision;
    TRY(run(b, &two[0], err));
    bench_unload(b);
    TRY(precision_of(b->k, DITFLEET__V1__PRECISION__PRECISION_FP32, DITFLEET__V1__PRECISION__PRECISION_FP32,
                     &b->precision, err));
    int rc = bench_load(b, err);
    if (rc == 0)
        rc = run(b, &two[1], err);
    b->precision = asked;
    return rc;
}

int bench_errors(struct bench *b, struct err *err)
{
    struct record two[2] = {{0}, {0}}; // in the precision; in float32
    if (b->precision.activation == DT_F32)
        return err_set(
            err, ERR_INVALID,
            "--what error compares with float32: it goes with --precision bf16, fp16, fp8 or int8, on a GPU");
    const int rc = run_both(b, two, err);
    if (rc == 0)
        compare(b, &two[0], &two[1]);
    for (int i = 0; i < 2; i++) {
        free(two[i].predictions);
        free(two[i].latents);
    }
    return rc;
}

void bench_print_errors(const struct bench *b)
{
    printf("%-28s relative L2 against float32, from the same noise\n%6s %12s %12s\n", "error", "step", "prediction",
           "latents");
    for (int i = 0; i < b->n_errors; i++)
        printf("%6d %11.3f%% %11.3f%%\n", i, 100 * b->errors[i].prediction, 100 * b->errors[i].latents);
}

json_t *bench_errors_json(const struct bench *b)
{
    json_t *list = json_array();
    for (int i = 0; i < b->n_errors; i++) // JSON knows no infinity
        json_array_append_new(
            list, isfinite(b->errors[i].prediction) && isfinite(b->errors[i].latents)
                      ? json_pack("{s:f,s:f}", "prediction", b->errors[i].prediction, "latents", b->errors[i].latents)
                      : json_null());
    return list;
}

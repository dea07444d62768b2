// bench_report.c: what was measured, as a table or as JSON.
#include <jansson.h>
#include <string.h>

#include "ops/cli/bench.h"
#include "ops/cli/json.h"
#include "proto/job.h"

static const double GIB = 1 << 30;

// ---- the verdict

// Milliseconds at the ceilings: operations at the measured rates, or bytes at the copy's, whichever is longer.
struct floor_ms {
    double compute, bandwidth, longest;
};

static struct floor_ms floor_of(const struct bench *b, const struct bench_cost *c)
{
    const struct bench_ceilings *top = &b->ceilings;
    struct floor_ms f = {0};
    if (top->product > 0 && top->attention > 0)
        f.compute = ((c->flops - c->attention) / top->product + c->attention / top->attention) * 1e3;
    if (top->copy > 0)
        f.bandwidth = c->bytes / top->copy * 1e3;
    f.longest = f.compute > f.bandwidth ? f.compute : f.bandwidth;
    return f;
}

// What was asked for, its time and its cost.
static const struct bench_cost *subject(const struct bench *b, double *ms)
{
    if (b->what == BENCH_TEXT) {
        *ms = b->t5.median + b->clip.median;
        return &b->text_cost;
    }
    if (b->what == BENCH_VAE) {
        *ms = b->images[b->n_images - 1].decode * 1e3;
        return &b->decode_cost;
    }
    *ms = b->step.median;
    return &b->step_cost;
}

struct verdict {
    const char *bound;
    char why[256];
};

static double compute_share(const struct bench_ops *ops)
{
    static const char *const names[] = {"linear", "attention", "conv2d"};
    double ms = 0;
    for (int i = 0; i < ops->count; i++)
        for (int j = 0; j < 3; j++)
            if (strncmp(ops->list[i].name, names[j], strlen(names[j])) == 0) {
                ms += ops->list[i].ms;
                break;
            }
    return ops->ms > 0 ? ms / ops->ms : 0;
}

static struct verdict judge(const struct bench *b)
{
    static const double IDLE = 0.15;    // of the time: more is worth a word
    static const double LAUNCH = 0.006; // ms that queueing an operation costs the host, about
    // Shorter ones finish before the next is queued; their times, asked for one by one, then hold the waiting as well.
    static const double SHORT = 0.010;
    struct verdict v = {0};
    double ms;
    const struct bench_cost *cost = subject(b, &ms);
    const struct floor_ms f = floor_of(b, cost);
    const double idle = ms - b->ops.ms;
    if (b->ops.count && ms < SHORT * b->ops.calls) {
        v.bound = "launch";
        snprintf(v.why, sizeof v.why, "%d operations in %.2f ms, %.1f us each: about what launching one takes",
                 b->ops.calls, ms, 1e3 * ms / b->ops.calls);
    } else if (b->ops.count && idle > IDLE * ms) {
        const bool launch = idle < 2 * LAUNCH * b->ops.calls;
        v.bound = launch ? "launch" : "host";
        snprintf(v.why, sizeof v.why, "the device's operations take %.2f of %.2f ms: it waits %s", b->ops.ms, ms,
                 launch ? "for the next of many small operations" : "for the host between operations");
    } else if (b->ops.count) {
        const double share = compute_share(&b->ops);
        v.bound = share >= 0.5 ? "compute" : "bandwidth";
        snprintf(v.why, sizeof v.why,
                 "products, attention and convolutions take %.0f %% of the operations' time; %.0f %% of "
                 "the ceilings are reached",
                 100 * share, 100 * f.longest / ms);
    } else {
        v.bound = f.compute >= f.bandwidth ? "compute" : "bandwidth";
        snprintf(v.why, sizeof v.why,
                 "by what it must do at least: operations %.2f ms, bytes %.2f ms; %.0f %% of the "
                 "ceilings are reached (this device tells no time of single operations)",
                 f.compute, f.bandwidth, 100 * f.longest / ms);
    }
    return v;
}

// ---- the table

static void print_spread(const char *name, const struct bench_spread *s)
{
    if (s->count)
        printf("%-28s %.2f ms [%.2f-%.2f], %d\n", name, s->median, s->min, s->max, s->count);
}

static void print_images(const struct bench *b)
{
    for (int i = 0; i < b->n_images; i++) {
        const struct bench_image *m = &b->images[i];
        printf("%-6s plan and noise %.1f ms, text %.1f ms, loop %.3f s = %.2f ms a step (median %.2f [%.2f-%.2f])",
               i ? "then" : "first", m->plan * 1e3, m->text * 1e3, m->loop, m->loop * 1e3 / m->step.count,
               m->step.median, m->step.min, m->step.max);
        if (m->decode > 0)
            printf(", decode %.1f ms", m->decode * 1e3);
        printf(", whole %.3f s", m->whole);
        if (b->ranks > 1)
            printf(", %.2f ms a step in exchanges", m->exchange * 1e3 / m->step.count);
        if (m->loaded > 0)
            printf("; %.2f GB of weights came back in %.2f s of it", (double)m->loaded / 1e9, m->load);
        printf("\n");
    }
}

static void print_cost(const struct bench *b, const char *name, const struct bench_cost *c, double ms)
{
    const struct floor_ms f = floor_of(b, c);
    printf("%-28s %.2f TFLOP, %.2f GB; at the ceilings %.2f ms (operations %.2f, bytes %.2f)", name, c->flops / 1e12,
           c->bytes / 1e9, f.longest, f.compute, f.bandwidth);
    if (ms > 0)
        printf("; reached %.1f TFLOP/s, %.0f %%", c->flops / ms / 1e9, 100 * f.longest / ms);
    printf("\n");
}

static void print_ops(const struct bench_ops *ops)
{
    if (!ops->count)
        return;
    printf("\n%-32s %6s %10s %6s\n", "operation", "calls", "ms", "share");
    for (int i = 0; i < ops->count; i++)
        printf("%-32s %6d %10.3f %5.1f%%\n", ops->list[i].name, ops->list[i].calls, ops->list[i].ms,
               100 * ops->list[i].ms / ops->ms);
    printf("%-32s %6d %10.3f\n\n", "all", ops->calls, ops->ms);
}

static void print_memory(const struct bench *b)
{
    const struct bench_memory *m = &b->memory;
    printf("%-28s weights as stored %.2f GiB, of the transformer here %.2f GiB, activations %.2f GiB", "memory",
           (double)m->weights / GIB, (double)m->transformer / GIB, (double)m->activations / GIB);
    if (m->total)
        printf("; in use on the device %.2f GiB before, %.2f loaded, %.2f at most, of %.2f", (double)m->before / GIB,
               (double)m->loaded / GIB, (double)m->peak / GIB, (double)m->total / GIB);
    printf("; this process %.2f GiB\n", (double)m->process / GIB);
}

static void print_peer(const struct bench *b)
{
    const struct bench_peer *p = &b->peer_result;
    if (!b->compare)
        return;
    if (*p->missing) {
        printf("%-28s none: %s\n", "peer", p->missing);
        return;
    }
    print_spread("peer, a step", &p->step);
    printf("%-28s %s; loop %.3f s; peer / ditfleet %.3f\n", "", p->name, p->loop, p->step.median / b->step.median);
}

void bench_print(struct bench *b)
{
    const Ditfleet__V1__Job *j = b->job;
    printf("%s on %s, %s%s: %u x %u, %u steps, %u text tokens\n", b->architecture ? b->architecture : b->model_dir,
           b->k->name, precision_name(&b->precision), b->twice ? " (weights rounded twice)" : "", j->width, j->height,
           j->num_inference_steps, j->max_sequence_length);
    if (b->ranks > 1) {
        char plan[PLAN_TEXT];
        plan_print(&b->plan, plan);
        printf("%-28s %s; a step sends %.3f GB from each rank%s\n", "plan", plan, b->step_sent / 1e9,
               b->direct ? ", written into the others' memory" : "");
    }
    printf("%-28s %.2f s after the process began%s\n", "loaded", b->loaded,
           b->architecture ? ", weights made up meanwhile" : "");
    if (b->what == BENCH_ERROR) {
        bench_print_errors(b);
        return;
    }
    if (b->what == BENCH_START) {
        printf("%-28s %.2f s after the process began\n", "first step done", b->first_step);
        print_memory(b);
        return;
    }
    print_spread("T5", &b->t5);
    print_spread("CLIP", &b->clip);
    print_images(b);
    if (b->what != BENCH_VAE)
        print_spread("a step", &b->step);
    print_peer(b);
    print_memory(b);
    printf("%-28s product %lld^3 %.1f TFLOP/s, attention of this shape %.1f TFLOP/s, copy %.3f TB/s\n", "ceilings",
           (long long)b->ceilings.product_side, b->ceilings.product / 1e12, b->ceilings.attention / 1e12,
           b->ceilings.copy / 1e12);
    if (b->ceilings.product * b->ceilings.attention * b->ceilings.copy == 0)
        printf("%-28s there was no memory left to measure those of 0\n", "");
    double ms;
    const struct bench_cost *cost = subject(b, &ms);
    print_cost(b,
               cost == &b->step_cost   ? "cost of a step"
               : cost == &b->text_cost ? "cost of text"
                                       : "cost of decoding",
               cost, ms);
    print_ops(&b->ops);
    const struct verdict v = judge(b);
    printf("%-28s %s: %s\n", "verdict", v.bound, v.why);
}

// ---- JSON

static json_t *spread_json(const struct bench_spread *s)
{
    return s->count
               ? json_pack("{s:f,s:f,s:f,s:i}", "median", s->median, "min", s->min, "max", s->max, "count", s->count)
               : json_null();
}

static json_t *cost_json(const struct bench *b, const struct bench_cost *c)
{
    const struct floor_ms f = floor_of(b, c);
    return json_pack("{s:f,s:f,s:f,s:f,s:f}", "flops", c->flops, "bytes", c->bytes, "attention_flops", c->attention,
                     "floor_ms", f.longest, "floor_bandwidth_ms", f.bandwidth);
}

static json_t *images_json(const struct bench *b)
{
    json_t *list = json_array();
    for (int i = 0; i < b->n_images; i++) {
        const struct bench_image *m = &b->images[i];
        json_array_append_new(list, json_pack("{s:I,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:o}", "loaded_bytes",
                                              (json_int_t)m->loaded, "load_s", m->load, "plan_s", m->plan, "text_s",
                                              m->text, "loop_s", m->loop, "decode_s", m->decode, "whole_s", m->whole,
                                              "exchange_s", m->exchange, "step_ms", spread_json(&m->step)));
    }
    return list;
}

static json_t *ops_json(const struct bench_ops *ops)
{
    json_t *list = json_array();
    for (int i = 0; i < ops->count; i++)
        json_array_append_new(list, json_pack("{s:s,s:i,s:f,s:f}", "op", ops->list[i].name, "calls", ops->list[i].calls,
                                              "ms", ops->list[i].ms, "share", ops->list[i].ms / ops->ms));
    return list;
}

static json_t *memory_json(const struct bench_memory *m)
{
    return json_pack("{s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I}", "weights", (json_int_t)m->weights, "transformer",
                     (json_int_t)m->transformer, "activations", (json_int_t)m->activations, "device_total",
                     (json_int_t)m->total, "device_before", (json_int_t)m->before, "device_loaded",
                     (json_int_t)m->loaded, "device_peak", (json_int_t)m->peak, "process_peak", (json_int_t)m->process);
}

static json_t *peer_json(const struct bench *b)
{
    const struct bench_peer *p = &b->peer_result;
    if (*p->missing)
        return json_pack("{s:s}", "missing", p->missing);
    return json_pack("{s:s,s:o,s:f,s:f}", "name", p->name, "step_ms", spread_json(&p->step), "loop_s", p->loop,
                     "peer_over_ditfleet", p->step.median / b->step.median);
}

static void put_measured(struct bench *b, json_t *root)
{
    const struct verdict v = judge(b);
    json_object_set_new(root, "t5_ms", spread_json(&b->t5));
    json_object_set_new(root, "clip_ms", spread_json(&b->clip));
    json_object_set_new(root, "step_ms", spread_json(&b->step));
    json_object_set_new(root, "images", images_json(b));
    json_object_set_new(root, "ceilings",
                        json_pack("{s:I,s:f,s:f,s:f}", "product_side", (json_int_t)b->ceilings.product_side,
                                  "product_tflops", b->ceilings.product / 1e12, "attention_tflops",
                                  b->ceilings.attention / 1e12, "copy_tb_s", b->ceilings.copy / 1e12));
    json_object_set_new(root, "cost",
                        json_pack("{s:o,s:o,s:o}", "step", cost_json(b, &b->step_cost), "text",
                                  cost_json(b, &b->text_cost), "decode", cost_json(b, &b->decode_cost)));
    json_object_set_new(root, "operations", ops_json(&b->ops));
    json_object_set_new(root, "verdict", json_pack("{s:s,s:s}", "bound", v.bound, "why", v.why));
    if (b->compare)
        json_object_set_new(root, "peer", peer_json(b));
}

void bench_print_json(struct bench *b)
{
    const Ditfleet__V1__Job *j = b->job;
    json_t *root =
        json_pack("{s:s,s:s,s:s,s:b,s:i,s:i,s:i,s:i,s:f}", "model", b->architecture ? b->architecture : b->model_dir,
                  "device", b->k->name, "precision", precision_name(&b->precision), "rounded_twice", b->twice, "width",
                  (int)j->width, "height", (int)j->height, "num_inference_steps", (int)j->num_inference_steps,
                  "max_sequence_length", (int)j->max_sequence_length, "loaded_s", b->loaded);
    json_object_set_new(root, "memory", memory_json(&b->memory));
    if (b->what == BENCH_ERROR)
        json_object_set_new(root, "errors", bench_errors_json(b));
    else if (b->what == BENCH_START)
        json_object_set_new(root, "first_step_s", json_real(b->first_step));
    else
        put_measured(b, root);
    json_print(root);
}

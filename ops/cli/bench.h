// bench.h: what the files of `ditfleet bench` share: what was asked, what was measured, and who measures what.
#ifndef DITFLEET_CLI_BENCH_H
#define DITFLEET_CLI_BENCH_H

#include <jansson.h>

#include "ops/cli/cli.h"
#include "worker/engine.h"
#include "worker/invent.h"
#include "worker/sampler.h"

enum bench_what { BENCH_STEP, BENCH_IMAGE, BENCH_TEXT, BENCH_VAE, BENCH_START, BENCH_ERROR, BENCH_WHATS };
enum { BENCH_MAX_REPEAT = 100, BENCH_MAX_OPS = 40, BENCH_OP_NAME = 48 };

// Milliseconds.
struct bench_spread {
    double median, min, max;
    int count; // 0: not measured
};
struct bench_spread bench_spread_of(double *values, int count); // sorts them

// One run of the engine, seconds. plan: until the encoders begin, noise included; text: from there to the first step,
// modulations included; what was not run is 0.
struct bench_image {
    double plan, text, loop, decode, whole;
    int64_t loaded; // bytes of weights that came to the device meanwhile, and seconds of it
    double load;
    double exchange; // of the loop, on this rank: talk with other ranks, waiting included
    struct bench_spread step;
};

struct bench_op {
    char name[BENCH_OP_NAME];
    int calls;
    double ms;
};

// Time of each operation of what was asked for (one step of it), longest first.
struct bench_ops {
    struct bench_op list[BENCH_MAX_OPS];
    int count, calls;
    double ms; // of all
};

// What the device reaches at best, a second, measured here; 0: not measured.
struct bench_ceilings {
    double product, attention; // operations
    double copy;               // bytes, read and written
    int64_t product_side;
};

// What the dry backend counts. attention: the operations of joint attention among flops.
struct bench_cost {
    double flops, bytes, attention;
};

struct bench_memory {
    int64_t weights, activations;        // bytes: as stored; predicted
    int64_t transformer;                 // of its weights, on the device of this rank
    int64_t total, before, loaded, peak; // of the device, in use by all processes; total 0: the host's memory
    int64_t process;                     // peak of this process, resident
};

struct bench_peer {
    char name[160], missing[400]; // missing: why there are no figures; "" when there are
    struct bench_spread step;     // ms
    double loop;                  // seconds, median
};

// Of a step, relative L2 against float32.
struct bench_error {
    double prediction, latents;
};

struct bench {
    // asked for
    const char *architecture, *model_dir, *device, *peer_script;
    const char *checkpoint; // where the architecture is to be written, instead of measuring
    enum bench_what what;
    int repeat, threads, ranks;
    struct plan want;    // degrees
    const char *blocks;  // of each stage, as text
    const char *weights; // NULL: replicated
    struct plan held;    // how the ranks have the transformer
    bool compare, json, exact;
    double memory_budget; // GiB; 0: what is free
    Ditfleet__V1__Job *job;
    // in use
    const struct kernels *k;
    struct precision precision;
    bool twice;                  // its weights are rounded twice (dit_info)
    struct invention *invention; // of the architecture's weights; NULL: the model has its own
    char directory[512];         // of the architecture's configurations; "" when there are none
    struct comm *comm;           // of the ranks
    struct engine *engine;
    struct home home;
    struct model *model;
    struct plan plan;
    struct peer *peer;
    // measured
    double loaded, first_step; // seconds since the process began
    struct bench_image images[BENCH_MAX_REPEAT];
    int n_images;
    struct bench_spread t5, clip, step, peer_step;
    struct bench_ops ops;
    struct bench_ceilings ceilings;
    struct bench_cost step_cost, text_cost, decode_cost;
    double step_sent; // bytes to other ranks
    bool direct;      // written into each other's memory
    struct bench_memory memory;
    struct bench_peer peer_result;
    struct bench_error errors[SAMPLER_MAX_STEPS];
    int n_errors;
};

// Rows of the joint sequence, text and image.
static inline int64_t bench_rows(const struct bench *b)
{
    const int64_t side = b->model->side_multiple; // pixels of an image token
    return (int64_t)b->job->max_sequence_length + b->job->width / side * (b->job->height / side);
}

// bench.c: the engine and the model on it, in b->precision; unloads what is there of them.
int bench_load(struct bench *b, struct err *err);
void bench_unload(struct bench *b);

// bench_run.c: through the engine.
int bench_images(struct bench *b, int count, struct err *err); // appended to images
int bench_start(struct bench *b, struct err *err);
int bench_profile(struct bench *b, struct err *err); // ops, where the backend can tell
void bench_ops_take(struct bench *b);                // ends a profile, adds it to ops
double bench_process_seconds(void);                  // since this process began
void bench_memory_seen(struct bench *b);             // raises memory.peak

// bench_part.c: one part of the model alone.
int bench_text(struct bench *b, int repeat, struct err *err); // t5 and clip, apart
int bench_costs(struct bench *b, struct err *err);

// bench_error.c
int bench_errors(struct bench *b, struct err *err);
void bench_print_errors(const struct bench *b);
json_t *bench_errors_json(const struct bench *b);

// bench_checkpoint.c: writes the architecture as a model's directory, and says what was written.
int bench_checkpoint(struct bench *b, struct err *err);

// bench_ceiling.c
int bench_ceilings(struct bench *b, struct err *err);

// bench_report.c
void bench_print(struct bench *b);
void bench_print_json(struct bench *b);

// bench_peer.c: the peer lives as a process beside this one and runs when it is told. Where none is installed the
// peer is NULL and peer_result says why.
int bench_peer_start(struct bench *b, struct err *err);
int bench_peer_run(struct bench *b, struct err *err); // one loop
void bench_peer_end(struct bench *b);

#endif

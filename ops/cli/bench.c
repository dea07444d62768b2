// ditfleet bench: what this machine does with a model, or with an architecture whose weights are made up here, beside
// what it could do.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/backend.h"
#include "ops/cli/bench.h"
#include "ops/cli/ranks.h"
#include "proto/conf.h"

static const char *const whats[BENCH_WHATS] = {[BENCH_STEP] = "step", [BENCH_IMAGE] = "image", [BENCH_TEXT] = "text",
                                               [BENCH_VAE] = "vae",   [BENCH_START] = "start", [BENCH_ERROR] = "error"};

// An architecture's configurations, in a directory of their own, and its numbers.
static int invent_model(struct bench *b, struct err *err)
{
    const char *temporary = getenv("TMPDIR");
    size_t largest = 0;
    snprintf(b->directory, sizeof b->directory, "%.400s/ditfleet-bench-XXXXXX", temporary ? temporary : "/tmp");
    if (!mkdtemp(b->directory)) {
        err_set(err, ERR_IO, "%s: cannot be made (%s)", b->directory, strerror(errno));
        b->directory[0] = '\0';
        return err->code;
    }
    TRY(architecture_write(b->architecture, b->directory, &largest, err));
    return invention_new(largest, b->threads, &b->invention, err);
}

static int choose_precision(struct bench *b, struct err *err)
{
    const Ditfleet__V1__Precision none = DITFLEET__V1__PRECISION__PRECISION_DEFAULT;
    Ditfleet__V1__Precision preferred = none;
    if (b->model_dir && b->job->precision == none) { // the model's own, which is known once it is read
        struct model *m;
        TRY(model_load(b->model_dir, &m, err));
        preferred = m->limits.precision;
        model_free(m);
    }
    return precision_of(b->k, b->job->precision, preferred, &b->precision, err);
}

int bench_load(struct bench *b, struct err *err)
{
    size_t available = 0, total = 0;
    const struct engine_options options = {
        .kernels = b->k,
        .device = {.threads = b->threads,
                   .gpu = comm_rank(b->comm),
                   .activation = b->precision.activation,
                   .exact = b->exact},
        .codes = b->precision.codes,
        .control = b->comm,
        .held = b->held,
        .memory_limit = b->k->memory ? INT64_MAX : 0,
        .memory_budget = (int64_t)(b->memory_budget * (1 << 30)),
    };
    TRY(engine_new(&options, &b->engine, err));
    b->home = engine_home(b->engine);
    b->home.invention = b->invention;
    if (b->k->memory)
        b->k->memory(b->home.d, &available, &total);
    b->memory.before = (int64_t)(total - available);
    TRY(model_load_on(b->architecture ? b->directory : b->model_dir, &b->home, &b->model, err));
    TRY(b->k->sync(b->home.d, err));
    b->loaded = bench_process_seconds();
    bench_memory_seen(b);
    b->memory.loaded = b->memory.peak;
    b->memory.weights = model_bytes(b->model);
    b->memory.transformer = model_placed_bytes(b->model, 1U << PART_DIT);
    b->twice |= b->model->info.twice;
    TRY(model_resolve_job(b->model, b->job, err));
    struct plan want = plan_keep_to(&b->held, &b->want);
    want.ranks = b->ranks;
    want.exact = b->exact;
    if (b->exact && want.ring == 0)
        want.ring = 1;
    return plan_make(&b->model->info, b->k, &want, job_true_cfg(b->job), &b->plan, err);
}

void bench_unload(struct bench *b)
{
    model_free(b->model);
    engine_free(b->engine);
    b->model = NULL;
    b->engine = NULL;
}

static int load(struct bench *b, struct err *err)
{
    TRY(choose_precision(b, err));
    if (b->architecture)
        TRY(invent_model(b, err));
    return bench_load(b, err);
}

// All steps of the later images: the first one pays for what is measured and built once.
static void gather_steps(struct bench *b)
{
    double medians[BENCH_MAX_REPEAT], min = 0, max = 0;
    const int first = b->n_images > 1 ? 1 : 0;
    for (int i = first; i < b->n_images; i++) {
        const struct bench_spread *s = &b->images[i].step;
        medians[i - first] = s->median;
        min = i == first || s->min < min ? s->min : min;
        max = s->max > max ? s->max : max;
    }
    b->step = bench_spread_of(medians, b->n_images - first);
    b->step.min = min;
    b->step.max = max;
}

static int pictures(struct bench *b, struct err *err)
{
    if (b->compare && comm_rank(b->comm) == 0)
        TRY(bench_peer_start(b, err));
    for (int i = 0; i <= b->repeat; i++) { // one image before those that count, and the peer between them
        if (b->compare)
            comm_barrier(b->comm); // so that no rank's device is busy waiting for another while the peer runs
        TRY(bench_images(b, 1, err));
        if (b->peer)
            TRY(bench_peer_run(b, err));
    }
    bench_peer_end(b);
    gather_steps(b);
    return 0;
}

static int measure(struct bench *b, struct err *err)
{
    if (b->what == BENCH_START)
        return bench_start(b, err);
    if (b->what == BENCH_ERROR)
        return bench_errors(b, err);
    if (b->what == BENCH_VAE)
        b->job->num_inference_steps = 1;
    if (b->what == BENCH_TEXT || b->what == BENCH_IMAGE)
        TRY(bench_text(b, b->repeat < 10 ? 10 : b->repeat, err));
    if (b->what != BENCH_TEXT)
        TRY(pictures(b, err));
    TRY(bench_profile(b, err));
    TRY(bench_costs(b, err));
    return bench_ceilings(b, err);
}

static int check(struct bench *b, const char *what, struct err *err)
{
    if (b->checkpoint && !b->architecture)
        return err_set(err, ERR_INVALID, "--write-checkpoint writes an architecture: it goes with --architecture NAME");
    if (!b->architecture == !b->model_dir)
        return err_set(err, ERR_INVALID, "one of --architecture NAME and --model DIR is needed");
    b->what = BENCH_WHATS;
    for (int i = 0; i < BENCH_WHATS; i++)
        if (strcmp(whats[i], what) == 0)
            b->what = (enum bench_what)i;
    if (b->what == BENCH_WHATS)
        return err_set(err, ERR_INVALID, "--what %.40s: it may be step, image, text, vae, start or error", what);
    if (b->compare && b->what != BENCH_STEP && b->what != BENCH_IMAGE)
        return err_set(err, ERR_INVALID, "--compare: the peer runs steps: it goes with --what step or image");
    if (b->memory_budget > 0 && strcmp(b->device, "cuda") != 0)
        return err_set(err, ERR_INVALID, "--memory-budget is of a GPU: it goes with --device cuda");
    if (b->exact && strcmp(b->device, "cuda") != 0)
        return err_set(err, ERR_INVALID, "--exact is of GPUs: it goes with --device cuda");
    if (strcmp(b->device, "dry") == 0)
        return err_set(err, ERR_INVALID, "--device dry: it may be cpu or cuda");
    if (b->checkpoint)
        return 0; // no device and no job
    TRY(job_check_fields(b->job, err));
    TRY(plan_parse_blocks(b->blocks, &b->want, err));
    TRY(plan_parse_weights(b->weights, &b->want, err));
    TRY(plan_hold(&b->want, b->ranks, &b->held, err));
    if (b->ranks > 1 && b->what == BENCH_START)
        return err_set(err, ERR_INVALID, "--what start is of one process: it goes with --ranks 1");
    if (b->job->num_images > 1)
        return err_set(err, ERR_INVALID, "--num-images: pictures are measured one by one; use --repeat");
    return backend_find(b->device, &b->k, err);
}

static void leave(struct bench *b)
{
    bench_unload(b);
    invention_free(b->invention);
    if (b->directory[0]) {
        architecture_remove(b->directory);
        rmdir(b->directory);
    }
    job_free(b->job);
    free(b);
}

// Every rank goes the same way; rank 0 runs the peer beside it, and tells.
static int bench_rank(void *arg, struct comm *comm, struct err *err)
{
    struct bench *b = arg;
    b->comm = comm;
    int rc = load(b, err);
    if (rc == 0)
        rc = measure(b, err);
    bench_peer_end(b);
    if (rc == 0 && comm_rank(comm) == 0)
        (b->json ? bench_print_json : bench_print)(b);
    bench_unload(b);
    if (rc != 0)
        comm_abort(comm, err->text); // nobody may wait for this rank
    return rc;
}

static int bench(struct bench *b, const char *what, struct err *err)
{
    TRY(check(b, what, err));
    const struct conf_group group = {.threads = b->threads, .local_ranks = b->ranks};
    b->threads = conf_group_threads(&group);
    if (b->checkpoint)
        return bench_checkpoint(b, err);
    return ranks_run(b->ranks, bench_rank, b, err);
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct bench *b = calloc(1, sizeof *b);
    const char *what = whats[BENCH_STEP];
    if (!b)
        return CLI_FAILED;
    b->device = "cpu";
    b->repeat = 3;
    b->ranks = 1;
    b->blocks = "";
    b->job = job_new();
    const struct cli_flag flags[] = {
        {"--architecture", "NAME", "flux.1-dev, flux.1-schnell or demo, with weights made up here", CLI_STRING,
         &b->architecture, 0, 0},
        {"--model", "DIR", "or a diffusers-format model directory", CLI_STRING, &b->model_dir, 0, 0},
        {"--write-checkpoint", "DIR", "measure nothing; write the architecture there, weights and all, for --model",
         CLI_STRING, &b->checkpoint, 0, 0},
        {"--what", "PART",
         "step: the loop (default); image: prompt to pixels; text; vae;\n"
         "                              start: from the start of the process to the first step;\n"
         "                              error: of the precision, step by step, against float32",
         CLI_STRING, &what, 0, 0},
        {"--device", "cpu|cuda", "where to compute; cuda: a GPU for each rank (default cpu)", CLI_STRING, &b->device, 0,
         0},
        {"--ranks", "N", "processes that make each picture together (default 1)", CLI_INT, &b->ranks, 1,
         COMM_MAX_RANKS},
        CLI_DEGREES(b->want, b->blocks, b->weights),
        {"--threads", "N", "threads of each rank of the CPU; default: cores / ranks", CLI_INT, &b->threads, 1, 1024},
        {"--repeat", "N", "images, or runs of a part, that count; one more goes before (default 3)", CLI_INT,
         &b->repeat, 1, BENCH_MAX_REPEAT - 1},
        {"--memory-budget", "GIB", "of the GPU, for everything; parts come and go (default: what is free)", CLI_DOUBLE,
         &b->memory_budget, 1, 1 << 20},
        CLI_EXACT(b->exact),
        {"--compare", NULL, "also run the peer, in turns: a compiled PyTorch transformer of the same sizes", CLI_BOOL,
         &b->compare, 0, 0},
        {"--peer", "SCRIPT", "the peer; default: tests/bench/reference_gpu.py of the source tree", CLI_STRING,
         &b->peer_script, 0, 0},
        {"--json", NULL, "one JSON object instead of a table", CLI_BOOL, &b->json, 0, 0},
    };
    struct err err = {.code = ERR_NONE};
    int rc = b->job ? cli_parse(self, flags, sizeof flags / sizeof *flags, b->job, argc, argv, NULL, NULL) : CLI_FAILED;
    if (rc < 0)
        rc = bench(b, what, &err) == 0 ? CLI_OK : cli_fail(&err);
    leave(b);
    return rc;
}

const struct cli_command cli_bench = {"bench", "", "measure a model or an architecture on this machine", run, true};

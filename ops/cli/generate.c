// ditfleet generate: one job on this machine, with no Redis and no supervisor.
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "kernels/backend.h"
#include "ops/cli/cli.h"
#include "ops/cli/json.h"
#include "ops/cli/keep.h"
#include "ops/cli/ranks.h"
#include "ops/cli/recorder.h"
#include "proto/conf.h"
#include "worker/engine.h"
#include "worker/output/describe.h"

struct generate {
    const char *model_dir, *device, *out, *latents, *budget, *weights;
    int64_t memory_budget; // budget in bytes
    const struct kernels *kernels;
    int ranks, threads;
    struct plan want;   // degrees
    struct plan held;   // how the ranks have the transformer
    const char *blocks; // of each stage, as text
    bool quiet, exact, json;
    Ditfleet__V1__Job *job;
    struct model *model;
    struct recorder *recorder;
    bool terminal;
    struct engine_result result;
};

static int show_progress(void *arg, enum engine_stage stage, int step, int steps, struct err *err)
{
    static const char *const names[] = {
        [ENGINE_TEXT] = "text", [ENGINE_DENOISE] = "denoise", [ENGINE_DECODE] = "decode"};
    const struct generate *g = arg;
    (void)err;
    if (!g->terminal)
        return 0;
    if (stage == ENGINE_DENOISE)
        fprintf(stderr, "\r%-8s %d/%d ", names[stage], step, steps);
    else
        fprintf(stderr, "\r%-8s       ", names[stage]);
    return 0;
}

// A line on stderr: the plan, seconds, memory, and which weights had to make way; then one for each of several ranks.
static int summarise(const struct generate *g, struct engine *e, const struct model *m, const struct engine_result *out,
                     struct err *err)
{
    struct engine_estimate estimate;
    struct rusage usage;
    char plan[PLAN_TEXT], evicted[128] = "";
    getrusage(RUSAGE_SELF, &usage);
    TRY(engine_predict(e, m, g->job, &out->plan, &estimate, err));
    plan_print(&out->plan, plan);
    for (enum model_part p = 0; p < PARTS; p++)
        if (out->moves.evicted & 1U << p)
            snprintf(evicted + strlen(evicted), sizeof evicted - strlen(evicted), "%s%s",
                     *evicted ? ", " : "; evicted ", model_part_name(p));
    const int64_t placed = model_placed_bytes(m, PARTS_ALL);
    const size_t *stage = estimate.stage_bytes;
    fprintf(stderr,
            "%s%s: text %.3f s, denoise %.3f s, decode %.3f s; weights %.1f MB, activations %.1f MB, peak %.1f MB, "
            "%.1f GFLOP",
            g->terminal ? "\r" : "", plan, out->encode_seconds, out->denoise_seconds, out->decode_seconds,
            (double)(placed ? placed : model_bytes(m)) / 1e6, (double)estimate.activation_bytes / 1e6,
            (double)usage.ru_maxrss * 1024 / 1e6, estimate.cost.flops / 1e9);
    fprintf(stderr, "; activations by stage: text %.1f, denoise %.1f, decode %.1f MB%s\n",
            (double)stage[ENGINE_TEXT] / 1e6, (double)stage[ENGINE_DENOISE] / 1e6, (double)stage[ENGINE_DECODE] / 1e6,
            evicted);
    for (int i = 0; out->plan.ranks > 1 && i < out->plan.ranks; i++)
        fprintf(stderr, "rank %d: computed %.3f, exchanged %.3f, waited %.3f s\n", i, out->ranks[i].compute,
                out->ranks[i].exchange, out->ranks[i].wait);
    return 0;
}

static int open_engine(const struct generate *g, struct comm *comm, struct engine **out, struct err *err)
{
    struct engine_options options = {.kernels = g->kernels,
                                     .device = {.threads = g->threads, .gpu = comm_rank(comm), .exact = g->exact},
                                     .control = comm,
                                     .memory_budget = g->memory_budget,
                                     .held = g->held,
                                     .tuned = true};
    struct precision precision;
    TRY(precision_of(g->kernels, g->job->precision, g->model->limits.precision, &precision, err));
    options.device.activation = precision.activation;
    options.codes = precision.codes;
    return engine_new(&options, out, err);
}

static int run_rank(void *arg, struct comm *comm, struct err *err)
{
    struct generate *g = arg;
    const bool leader = comm_rank(comm) == 0;
    const struct engine_hooks hooks = {
        .progress = leader && !g->quiet ? show_progress : NULL, .trace = g->latents ? recorder_put : NULL, .arg = g};
    struct engine_hooks mine = hooks;
    if (g->latents) // both hooks share arg: the recorder wins, and progress is left out
        mine.arg = g->recorder, mine.progress = NULL;
    struct engine *e = NULL;
    struct model *placed = NULL; // on the CPU the mapped files serve all ranks that have all weights
    const bool mapped = g->kernels == &kernels_cpu && g->held.weights == PLAN_REPLICATED;
    int rc = open_engine(g, comm, &e, err);
    const struct home home = rc == 0 ? engine_home(e) : (struct home){0};
    if (rc == 0 && !mapped)
        rc = model_load_on(g->model_dir, &home, &placed, err);
    if (rc != 0)
        comm_abort(comm, err->text); // nobody may wait for this rank
    else
        rc = engine_run(e, placed ? placed : g->model, g->job, &g->want, &mine, &g->result, err);
    if (rc == 0 && leader && !g->quiet)
        rc = summarise(g, e, placed ? placed : g->model, &g->result, err);
    model_free(placed);
    engine_free(e);
    return rc;
}

// files: their paths are added.
static int write_pictures(const struct generate *g, const struct engine_result *result, json_t *files, struct err *err)
{
    const Ditfleet__V1__Job *job = g->job;
    char plan[PLAN_TEXT], path[4096];
    plan_print(&result->plan, plan);
    for (uint32_t i = 0; i < job->num_images; i++) {
        struct description d;
        struct picture p = {0};
        TRY(describe_picture(job, g->model->hash, plan, i, &d, err));
        int rc = picture_encode(result->pixels + (size_t)i * job->width * job->height * 3, job->height, job->width,
                                d.texts, DESCRIPTION_TEXTS, &p, err);
        description_free(&d);
        TRY(rc);
        cli_numbered(g->out, i, job->num_images, path, sizeof path);
        rc = keep_file(path, p.bytes, p.len, err);
        picture_free(&p);
        TRY(rc);
        json_array_append_new(files, json_string(path));
        if (!g->json)
            printf("%s\n", path);
    }
    return 0;
}

// What it was asked to draw is left out: whoever asked knows it.
static void print_json(const struct generate *g, const struct engine_result *r, json_t *files)
{
    char plan[PLAN_TEXT];
    json_t *ranks = json_array();
    plan_print(&r->plan, plan);
    for (int i = 0; i < r->plan.ranks; i++)
        json_array_append_new(ranks,
                              json_pack("{s:f,s:f,s:f}", "compute_seconds", r->ranks[i].compute, "exchange_seconds",
                                        r->ranks[i].exchange, "wait_seconds", r->ranks[i].wait));
    json_print(json_pack("{s:O,s:i,s:i,s:i,s:I,s:s,s:s,s:f,s:f,s:f,s:o}", "files", files, "width", (int)g->job->width,
                         "height", (int)g->job->height, "num_inference_steps", (int)g->job->num_inference_steps, "seed",
                         (json_int_t)g->job->seed, "model_hash", g->model->hash, "plan", plan, "encode_seconds",
                         r->encode_seconds, "denoise_seconds", r->denoise_seconds, "decode_seconds", r->decode_seconds,
                         "ranks", ranks));
}

static void warn_cut(const struct engine_result *r)
{
    static const char *const names[] = {"prompt", "prompt_2", "negative_prompt", "negative_prompt_2"};
    for (int i = 0; i < 4; i++)
        if (r->prompt_cut[i])
            fprintf(stderr, "ditfleet: warning: %s is longer than its encoder takes; the rest was cut off\n", names[i]);
}

static int generate(struct generate *g, struct err *err)
{
    TRY(job_check_fields(g->job, err));
    TRY(model_load(g->model_dir, &g->model, err));
    TRY(model_resolve_job(g->model, g->job, err));
    if (g->latents && !(g->recorder = recorder_new()))
        return err_set(err, ERR_NO_MEMORY, "no memory to record latents");
    int rc = ranks_run(g->ranks, run_rank, g, err);
    if (rc == 0) {
        json_t *files = json_array();
        warn_cut(&g->result);
        rc = write_pictures(g, &g->result, files, err);
        if (rc == 0 && g->json)
            print_json(g, &g->result, files);
        json_decref(files);
    }
    if (rc == 0 && g->latents) {
        recorder_put(g->recorder, "image_u8",
                     tensor_of(g->result.pixels, DT_U8, 3, g->job->height, g->job->width, 3, 1));
        rc = recorder_write(g->recorder, g->latents, err);
    }
    engine_result_free(&g->result);
    return rc;
}

static int choose_device(struct generate *g, struct err *err)
{
    if (g->budget && strcmp(g->device, "cpu") == 0)
        return err_set(err, ERR_INVALID, "--memory-budget is of a GPU's memory: --device cpu has none");
    if (g->budget && !conf_size(g->budget, &g->memory_budget))
        return err_set(err, ERR_INVALID, "--memory-budget %.40s: bytes up to 1024GiB, written like 24GiB or 512MiB",
                       g->budget);
    if (strcmp(g->device, "dry") == 0)
        return err_set(err, ERR_INVALID, "--device dry: it may be cpu or cuda");
    if (g->exact && strcmp(g->device, "cpu") == 0)
        return err_set(err, ERR_INVALID, "--exact is of GPUs: CPU ranks are so by themselves");
    TRY(plan_parse_blocks(g->blocks, &g->want, err));
    TRY(plan_parse_weights(g->weights, &g->want, err));
    TRY(plan_hold(&g->want, g->ranks, &g->held, err));
    return backend_find(g->device, &g->kernels, err);
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct generate g = {
        .device = "cpu", .out = "out.png", .blocks = "", .ranks = 1, .job = job_new(), .terminal = isatty(2)};
    const struct cli_flag flags[] = {
        {"--model", "DIR", "diffusers-format model directory (required)", CLI_STRING, &g.model_dir, 0, 0},
        {"--device", "cpu|cuda", "where to compute; cuda: a GPU for each rank (default cpu)", CLI_STRING, &g.device, 0,
         0},
        {"--memory-budget", "BYTES", "of the GPU, for everything: 24GiB; parts make way for each other (default: all)",
         CLI_STRING, &g.budget, 0, 0},
        {"--ranks", "N", "processes that share the work", CLI_INT, &g.ranks, 1, COMM_MAX_RANKS},
        {"--threads", "N", "threads of each rank; default: cores / ranks", CLI_INT, &g.threads, 1, 1024},
        CLI_DEGREES(g.want, g.blocks, g.weights),
        {"--data-degree", "N", "parts that make several images side by side; default: as they can be dealt", CLI_INT,
         &g.want.data, 1, COMM_MAX_RANKS},
        CLI_EXACT(g.exact),
        {"-o", "FILE", "the PNG to write (default out.png)", CLI_STRING, &g.out, 0, 0},
        {"--save-latents", "FILE", "also write embeddings, noise and every step's latents as safetensors", CLI_STRING,
         &g.latents, 0, 0},
        {"--quiet", NULL, "no progress, no figures", CLI_BOOL, &g.quiet, 0, 0},
        {"--json", NULL, "print one JSON object: files, plan, seed, seconds", CLI_BOOL, &g.json, 0, 0},
    };
    struct err err = {.code = ERR_NONE};
    int rc = cli_parse(self, flags, sizeof flags / sizeof *flags, g.job, argc, argv, NULL, NULL);
    if (rc < 0 && !g.model_dir) {
        fprintf(stderr, "ditfleet generate: --model DIR is required\ntry: ditfleet generate --help\n");
        rc = CLI_USAGE;
    }
    if (rc < 0 && choose_device(&g, &err) != 0)
        rc = cli_fail(&err);
    if (rc < 0) {
        const struct conf_group group = {.threads = g.threads, .local_ranks = g.ranks};
        g.threads = conf_group_threads(&group);
        rc = generate(&g, &err) == 0 ? CLI_OK : cli_fail(&err);
    }
    recorder_free(g.recorder);
    model_free(g.model);
    job_free(g.job);
    return rc;
}

const struct cli_command cli_generate = {"generate", "", "make one picture on this machine, with no Redis", run, true};

// ditfleet plan: the plans that some ranks have for a job, and what each would cost, without running one.
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/backend.h"
#include "ops/cli/cli.h"
#include "ops/cli/json.h"
#include "proto/conf.h"
#include "worker/invent.h"
#include "worker/ownership.h"
#include "worker/tuned.h"

enum { MOST_ROWS = 256 };

// A plan of some of the ranks, as many groups of them as there can be.
struct row {
    int groups;
    struct price price;
    int64_t memory; // bytes of the fullest rank
    struct err why; // not to be had; code ERR_NONE: it is
    bool picked;
};

struct planning {
    // asked for
    const char *model_dir, *architecture, *device, *objective, *budget, *blocks, *weights; // NULL: as they fit
    int ranks, threads;
    struct plan want;
    bool all, json;
    Ditfleet__V1__Job *job;
    // in use
    struct kernels k; // saying the activation type
    struct precision precision;
    struct tuned_key key;
    struct machine machine;
    bool tuned, throughput;
    int64_t limit; // bytes of memory of a rank
    struct invention *invention;
    char directory[512]; // of the architecture's configurations; "" when there are none
    struct model *model;
    struct row rows[MOST_ROWS];
    int n_rows;
};

// ---- what is planned for

static int invent_model(struct planning *p, struct err *err)
{
    const char *temporary = getenv("TMPDIR");
    size_t largest = 0;
    snprintf(p->directory, sizeof p->directory, "%.400s/ditfleet-plan-XXXXXX", temporary ? temporary : "/tmp");
    if (!mkdtemp(p->directory)) {
        err_set(err, ERR_IO, "%s: cannot be made (%s)", p->directory, strerror(errno));
        p->directory[0] = '\0';
        return err->code;
    }
    TRY(architecture_write(p->architecture, p->directory, &largest, err));
    TRY(invention_new(largest, p->threads, &p->invention, err));
    const struct home home = {.invention = p->invention, .plan = true};
    return model_load_on(p->directory, &home, &p->model, err);
}

static int prepare(struct planning *p, struct err *err)
{
    const struct kernels *k;
    const struct conf_group group = {.threads = p->threads, .local_ranks = p->ranks};
    p->threads = conf_group_threads(&group);
    TRY(backend_find(p->device, &k, err));
    TRY(p->architecture ? invent_model(p, err) : model_load(p->model_dir, &p->model, err));
    TRY(model_resolve_job(p->model, p->job, err));
    TRY(precision_of(k, p->job->precision, p->model->limits.precision, &p->precision, err));
    p->k = *k;
    p->k.activation = p->precision.activation;
    tuned_key_of(k, p->ranks, p->threads, &p->precision, &p->key);
    p->tuned = tuned_load(NULL, &p->key, &p->machine);
    if (!p->tuned)
        p->machine = machine_default(&p->key);
    if (!p->budget)
        p->limit = k == &kernels_cpu ? engine_host_memory_free() / p->ranks : INT64_MAX;
    return 0;
}

// ---- the plans

// Of the transformer, on the fullest rank.
static int64_t transformer_bytes(const struct planning *p, const struct plan *plan)
{
    int64_t most = 0;
    for (int r = 0; r < plan->ranks; r++) {
        const int64_t bytes = ownership_bytes(p->model->dit->weights, plan, r);
        most = bytes > most ? bytes : most;
    }
    return most;
}

// On the CPU ranks share the mapped weights; a GPU holds those of the stage in hand, at least.
static int64_t memory_of(const struct planning *p, const struct plan *plan, const struct engine_estimate *most)
{
    if (p->key.threads != 0)
        return (int64_t)most->activation_bytes + ownership_shard_bytes(p->model->dit->weights, plan);
    const int64_t weights[ENGINE_STAGES] = {model_part_bytes(p->model, PART_CLIP) + model_part_bytes(p->model, PART_T5),
                                            transformer_bytes(p, plan), model_part_bytes(p->model, PART_VAE)};
    int64_t fullest = (int64_t)most->activation_bytes;
    for (int i = 0; i < ENGINE_STAGES; i++) {
        const int64_t bytes = (int64_t)most->stage_bytes[i] + ENGINE_LIBRARY_BYTES + weights[i];
        fullest = bytes > fullest ? bytes : fullest;
    }
    return fullest;
}

static double rate(const struct row *r)
{
    return r->groups * r->price.plan.data / price_seconds(&r->price);
}

// Fastest first. With the objective latency all have one group.
static int fastest_first(const void *a, const void *b)
{
    const struct row *x = a, *y = b;
    if ((x->why.code == ERR_NONE) != (y->why.code == ERR_NONE))
        return x->why.code == ERR_NONE ? -1 : 1;
    if (x->why.code != ERR_NONE)
        return 0;
    return (rate(x) < rate(y)) - (rate(x) > rate(y));
}

// *fit: some of them do.
static int add_rows(struct planning *p, int groups, const struct plan *want, bool *fit, struct err *err)
{
    struct plan_choice choices[PLAN_MAX_CHOICES];
    struct engine_estimate most;
    const int n = plan_choices(&p->model->info, &p->k, want, job_true_cfg(p->job), choices);
    *fit = false;
    for (int i = 0; i < n && p->n_rows < MOST_ROWS; i++) {
        struct row *r = &p->rows[p->n_rows++];
        *r = (struct row){.groups = groups, .price.plan = choices[i].plan, .why = choices[i].why};
        if (r->why.code != ERR_NONE)
            continue;
        TRY(cost_of(&p->machine, p->model, p->job, &choices[i].plan, &p->k, &r->price, err));
        TRY(cost_memory(p->model, p->job, &choices[i].plan, &p->k, &most, err));
        r->memory = memory_of(p, &choices[i].plan, &most);
        if (r->memory > p->limit)
            err_set(&r->why, ERR_UNSUPPORTED, "needs %.1f MB of memory on a rank, there are %.1f",
                    (double)r->memory / 1e6, (double)p->limit / 1e6);
        *fit |= r->memory <= p->limit;
    }
    return 0;
}

// Images are made side by side where they can be, one after the other where that is asked for or all that fits: as the
// engine has it. *fit: some plan does.
static int add_dealt(struct planning *p, int groups, const struct plan *asked, bool *fit, struct err *err)
{
    struct plan want = *asked;
    TRY(plan_deal_images(&want, (int)p->job->num_images, err));
    TRY(add_rows(p, groups, &want, fit, err));
    if (*fit || want.data == 1 || asked->data != 0)
        return 0;
    want.data = 1;
    return add_rows(p, groups, &want, fit, err);
}

// With weights as a group of these degrees would have them; sharded, where nothing was said, when no other plan fits.
static int add_group(struct planning *p, int groups, struct err *err)
{
    struct plan held, want;
    struct err none;
    bool fit;
    if (plan_hold(&p->want, p->ranks / groups, &held, &none) != 0)
        held = (struct plan){.weights = p->want.weights}; // and plan_make says what is wrong
    want = plan_keep_to(&held, &p->want);
    want.ranks = p->ranks / groups;
    TRY(add_dealt(p, groups, &want, &fit, err));
    if (fit || p->weights || want.ranks == 1 || held.weights != PLAN_REPLICATED || plan_in_patches(&want))
        return 0;
    want.weights = PLAN_SHARDED;
    return add_dealt(p, groups, &want, &fit, err);
}

// Where the degrees asked for make no plan, plan_make says what would; where none fits, the error says how near it is.
static int refuse(const struct planning *p, struct err *err)
{
    struct plan want = p->want, unused;
    want.ranks = p->ranks;
    TRY(plan_deal_images(&want, (int)p->job->num_images, err));
    TRY(plan_make(&p->model->info, &p->k, &want, job_true_cfg(p->job), &unused, err));
    const struct row *least = NULL;
    for (int i = 0; i < p->n_rows; i++)
        if (p->rows[i].memory > 0 && (!least || p->rows[i].memory < least->memory))
            least = &p->rows[i];
    return err_set(err, ERR_UNSUPPORTED, "no plan fits: the one that takes least %s", least ? least->why.text : "");
}

static int enumerate(struct planning *p, struct err *err)
{
    for (int groups = p->throughput ? p->ranks : 1; groups >= 1; groups--) // those that exchange least first
        if (p->ranks % groups == 0)
            TRY(add_group(p, groups, err));
    double seconds[MOST_ROWS]; // that a step of one picture takes of the whole machine
    for (int i = 0; i < p->n_rows; i++)
        seconds[i] = p->rows[i].why.code == ERR_NONE ? 1 / rate(&p->rows[i]) : -1;
    const int picked = cost_pick(seconds, p->n_rows);
    if (picked < 0 && !p->all)
        return refuse(p, err);
    if (picked >= 0)
        p->rows[picked].picked = true;
    qsort(p->rows, (size_t)p->n_rows, sizeof *p->rows, fastest_first);
    return 0;
}

// ---- what is printed

static void row_text(const struct planning *p, const struct row *r, char text[PLAN_TEXT + 16])
{
    char plan[PLAN_TEXT];
    plan_print(&r->price.plan, plan);
    if (p->throughput)
        snprintf(text, PLAN_TEXT + 16, "%d x %s", r->groups, plan);
    else
        snprintf(text, PLAN_TEXT + 16, "%s", plan);
}

static void print_row(const struct planning *p, const struct row *r, int width)
{
    char text[PLAN_TEXT + 16];
    row_text(p, r, text);
    if (r->why.code != ERR_NONE) {
        if (p->all)
            printf("- %-*s %s\n", width, text, r->why.text);
        return;
    }
    printf("%c %-*s %9.2f %9.2f %9.2f %9.2f %10.1f %9.2f\n", r->picked ? '*' : ' ', width, text,
           price_seconds(&r->price) * 1e3, r->price.compute * 1e3, r->price.exchange * 1e3, r->price.sent / 1e6,
           (double)r->memory / 1e6, rate(r));
}

static void print_table(const struct planning *p)
{
    const Ditfleet__V1__Job *job = p->job;
    char text[PLAN_TEXT + 16];
    int width = 32;
    for (int i = 0; i < p->n_rows; i++) {
        row_text(p, &p->rows[i], text);
        width = (int)strlen(text) > width ? (int)strlen(text) : width;
    }
    printf("%u x %u, %u steps, %d ranks, %s in %s: %s\n", job->width, job->height, job->num_inference_steps, p->ranks,
           p->key.device, p->key.precision, p->throughput ? "steps a second of all groups" : "the time of a step");
    if (!p->tuned)
        printf("not measured: figures by default parameters; `ditfleet tune --device %s --ranks %d` measures them\n",
               p->device, p->key.ranks);
    else if (p->ranks > p->key.ranks)
        puts("measured on one GPU; what they exchange goes by default parameters");
    printf("  %-*s %9s %9s %9s %9s %10s %9s\n", width, "plan", "ms a step", "compute", "exchange", "sent MB",
           "memory MB", "steps / s");
    for (int i = 0; i < p->n_rows; i++)
        print_row(p, &p->rows[i], width);
}

static json_t *row_json(const struct row *r)
{
    static const char *const weights[] = {
        [PLAN_REPLICATED] = "replicated", [PLAN_SHARDED] = "sharded", [PLAN_BY_STAGE] = "by stage"};
    const struct plan *plan = &r->price.plan;
    json_t *row = json_pack("{s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:b}", "groups", r->groups, "ranks",
                            plan->ranks, "cfg", plan->cfg, "ulysses", plan->ulysses, "ring", plan->ring, "pipe",
                            plan->pipe, "patches", plan->patches, "warmup", plan->warmup, "data", plan->data, "weights",
                            weights[plan->weights], "picked", r->picked);
    if (plan->blocks[0]) {
        json_t *blocks = json_array();
        for (int i = 0; i < plan->pipe; i++)
            json_array_append_new(blocks, json_integer(plan->blocks[i]));
        json_object_set_new(row, "blocks", blocks);
    }
    if (r->why.code != ERR_NONE)
        json_object_set_new(row, "why", json_string(r->why.text));
    if (price_seconds(&r->price) > 0)
        json_object_update_new(
            row, json_pack("{s:f, s:f, s:f, s:I, s:I, s:f}", "step_ms", price_seconds(&r->price) * 1e3, "compute_ms",
                           r->price.compute * 1e3, "exchange_ms", r->price.exchange * 1e3, "sent_bytes",
                           (json_int_t)r->price.sent, "memory_bytes", (json_int_t)r->memory, "steps_per_s", rate(r)));
    return row;
}

static void print_json(const struct planning *p)
{
    json_t *plans = json_array();
    for (int i = 0; i < p->n_rows; i++)
        if (p->all || p->rows[i].why.code == ERR_NONE)
            json_array_append_new(plans, row_json(&p->rows[i]));
    json_print(json_pack("{s:s, s:s, s:s, s:i, s:i, s:i, s:i, s:i, s:s, s:b, s:o}", "device", p->device, "name",
                         p->key.device, "precision", p->key.precision, "ranks", p->ranks, "threads", p->key.threads,
                         "width", (int)p->job->width, "height", (int)p->job->height, "num_inference_steps",
                         (int)p->job->num_inference_steps, "objective", p->objective, "tuned", p->tuned, "plans",
                         plans));
}

// ---- the command

static int check(struct planning *p, struct err *err)
{
    if (!p->architecture == !p->model_dir)
        return err_set(err, ERR_INVALID, "one of --architecture NAME and --model DIR is needed");
    p->throughput = strcmp(p->objective, "throughput") == 0;
    if (!p->throughput && strcmp(p->objective, "latency") != 0)
        return err_set(err, ERR_INVALID, "--objective %.40s: it may be latency or throughput", p->objective);
    if (strcmp(p->device, "dry") == 0)
        return err_set(err, ERR_INVALID, "--device dry: it may be cpu or cuda");
    if (p->budget && !conf_size(p->budget, &p->limit))
        return err_set(err, ERR_INVALID, "--memory-budget %.40s: bytes up to 1024GiB, written like 24GiB or 512MiB",
                       p->budget);
    TRY(plan_parse_blocks(p->blocks, &p->want, err));
    TRY(plan_parse_weights(p->weights, &p->want, err));
    return job_check_fields(p->job, err);
}

static int plan(struct planning *p, struct err *err)
{
    TRY(check(p, err));
    TRY(prepare(p, err));
    TRY(enumerate(p, err));
    (p->json ? print_json : print_table)(p);
    return 0;
}

static void leave(struct planning *p)
{
    model_free(p->model);
    invention_free(p->invention);
    if (p->directory[0]) {
        architecture_remove(p->directory);
        rmdir(p->directory);
    }
    job_free(p->job);
    free(p);
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct planning *p = calloc(1, sizeof *p);
    if (!p)
        return CLI_FAILED;
    p->device = "cpu";
    p->objective = "latency";
    p->blocks = "";
    p->ranks = 1;
    p->job = job_new();
    const struct cli_flag flags[] = {
        {"--model", "DIR", "diffusers-format model directory", CLI_STRING, &p->model_dir, 0, 0},
        {"--architecture", "NAME", "or flux.1-dev, flux.1-schnell or demo: no checkpoint is needed", CLI_STRING,
         &p->architecture, 0, 0},
        {"--device", "cpu|cuda", "what the ranks are (default cpu)", CLI_STRING, &p->device, 0, 0},
        {"--ranks", "N", "processes, or GPUs, that share the work", CLI_INT, &p->ranks, 1, COMM_MAX_RANKS},
        {"--threads", "N", "threads of each rank of a CPU; default: cores / ranks", CLI_INT, &p->threads, 1, 1024},
        {"--objective", "latency|throughput",
         "latency: all ranks make one picture (default);\n"
         "                              throughput: groups of them one each",
         CLI_STRING, &p->objective, 0, 0},
        {"--memory-budget", "BYTES",
         "what a rank may take: 24GiB (default: of the host, what is free, shared; of a GPU, no bound)", CLI_STRING,
         &p->budget, 0, 0},
        CLI_DEGREES(p->want, p->blocks, p->weights), // plans with these alone
        {"--data-degree", "N", "parts that make several images side by side; default: as they can be dealt", CLI_INT,
         &p->want.data, 1, COMM_MAX_RANKS},
        {"--all", NULL, "also list what is no plan, or does not fit into memory, and why", CLI_BOOL, &p->all, 0, 0},
        {"--json", NULL, "one JSON object instead of a table", CLI_BOOL, &p->json, 0, 0},
    };
    struct err err = {.code = ERR_NONE};
    int rc = p->job ? cli_parse(self, flags, sizeof flags / sizeof *flags, p->job, argc, argv, NULL, NULL) : CLI_FAILED;
    if (rc < 0)
        rc = plan(p, &err) == 0 ? CLI_OK : cli_fail(&err);
    leave(p);
    return rc;
}

const struct cli_command cli_plan = {"plan", "", "the plans that some ranks have for a job, and their cost", run, true};

#include "worker/model.h"

#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "worker/config.h"
#include "worker/residency.h"
#include "worker/rng.h"
#include "worker/weights.h"

enum {
    SEQUENCE_LIMIT = 512, // the reference pipeline's
    MAX_DIR = 900,
};

static int check_pipeline(const char *dir, struct err *err)
{
    struct config *c = config_open(dir, "model_index.json", err);
    config_require(c, "_class_name", "FluxPipeline");
    return config_close(c, err);
}

// NULL where there is no ditfleet.json.
static struct config *open_settings(const struct model *m, struct err *err)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/ditfleet.json", m->dir);
    return access(path, F_OK) == 0 ? config_open(m->dir, "ditfleet.json", err) : NULL;
}

static int find_transformer(struct model *m, struct err *err)
{
    struct config *c = open_settings(m, err);
    if (!c)
        return 0;
    config_path_or(c, "transformer", m->transformer, sizeof m->transformer);
    return config_close(c, err);
}

static int load_limits(struct model *m, struct err *err)
{
    static const char *const precisions[] = {"default", "fp32", "bf16", "fp16",
                                             "fp8",     "int8", NULL}; // as job.proto numbers them
    struct model_limits *l = &m->limits;
    const int64_t side = 128 * vae_scale(m->vae);
    int precision = DITFLEET__V1__PRECISION__PRECISION_DEFAULT;
    *l = (struct model_limits){.default_width = side,
                               .default_height = side,
                               .default_num_inference_steps = 28,
                               .default_max_sequence_length = SEQUENCE_LIMIT,
                               .default_guidance_scale = 3.5,
                               .min_side = m->side_multiple,
                               .max_side = 8192,
                               .max_pixels = (int64_t)4096 * 4096};
    struct config *c = open_settings(m, err);
    if (!c)
        return 0;
    config_path_or(c, "transformer", m->transformer, sizeof m->transformer); // known by now, and known to be a key
    config_int_or(c, "default_width", 16, 16384, &l->default_width);
    config_int_or(c, "default_height", 16, 16384, &l->default_height);
    config_int_or(c, "default_num_inference_steps", 1, SAMPLER_MAX_STEPS, &l->default_num_inference_steps);
    config_int_or(c, "default_max_sequence_length", 1, SEQUENCE_LIMIT, &l->default_max_sequence_length);
    config_float_or(c, "default_guidance_scale", 0, 100, &l->default_guidance_scale);
    config_int_or(c, "min_side", 16, 16384, &l->min_side);
    config_int_or(c, "max_side", l->min_side, 16384, &l->max_side);
    config_int_or(c, "max_pixels", 256, (int64_t)16384 * 16384, &l->max_pixels);
    config_choice_or(c, "precision", precisions, &precision);
    config_refuse_rest(c);
    l->precision = (Ditfleet__V1__Precision)precision;
    const struct {
        const char *key;
        int64_t side;
    } sides[] = {{"default_width", l->default_width}, {"default_height", l->default_height}};
    for (int i = 0; i < 2; i++)
        if (sides[i].side % m->side_multiple || sides[i].side < l->min_side || sides[i].side > l->max_side)
            config_fail(c, ERR_INVALID, "%s %lld must be a multiple of %lld from min_side %lld to max_side %lld",
                        sides[i].key, (long long)sides[i].side, (long long)m->side_multiple, (long long)l->min_side,
                        (long long)l->max_side);
    if (l->default_width * l->default_height > l->max_pixels)
        config_fail(c, ERR_INVALID, "default_width x default_height must be at most max_pixels %lld",
                    (long long)l->max_pixels);
    return config_close(c, err);
}

// The parts must fit each other: every width that one produces and another consumes.
static int check_fit(const struct model *m, struct err *err)
{
    const struct {
        const char *what, *with;
        int64_t found, wanted;
    } rows[] = {
        {"text_encoder hidden_size", "transformer pooled_projection_dim", clip_hidden(m->clip), m->info.pooled_dim},
        {"text_encoder_2 d_model", "transformer joint_attention_dim", t5_hidden(m->t5), m->info.text_dim},
        {"4 x vae latent_channels", "transformer in_channels", 4 * vae_latent_channels(m->vae), m->info.channels},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (rows[i].found != rows[i].wanted)
            return err_set(err, ERR_INVALID, "%s: %s is %lld but %s is %lld", m->dir, rows[i].what,
                           (long long)rows[i].found, rows[i].with, (long long)rows[i].wanted);
    if (m->clip_tokenizer && clip_tokenizer_id_limit(m->clip_tokenizer) > clip_vocabulary(m->clip))
        return err_set(err, ERR_INVALID, "%s: tokenizer makes ids up to %d but text_encoder's vocab_size is %lld",
                       m->dir, clip_tokenizer_id_limit(m->clip_tokenizer) - 1, (long long)clip_vocabulary(m->clip));
    if (m->t5_tokenizer && t5_tokenizer_id_limit(m->t5_tokenizer) > t5_vocabulary(m->t5))
        return err_set(err, ERR_INVALID, "%s: tokenizer_2 makes ids up to %d but text_encoder_2's vocab_size is %lld",
                       m->dir, t5_tokenizer_id_limit(m->t5_tokenizer) - 1, (long long)t5_vocabulary(m->t5));
    return 0;
}

static const char *part(char path[1024], const char *dir, const char *name)
{
    snprintf(path, 1024, "%.*s/%s", MAX_DIR, dir, name);
    return path;
}

static const struct weights *weights_of(const struct model_parts *parts, enum model_part which)
{
    switch (which) {
    case PART_CLIP:
        return clip_weights(parts->clip);
    case PART_T5:
        return t5_weights(parts->t5);
    case PART_DIT:
        return parts->dit->weights;
    default:
        return vae_weights(parts->vae);
    }
}

// Every file that shapes a picture: the small ones whole, the weights as weights_fingerprint samples them.
static void fingerprint(struct model *m)
{
    static const char *const files[] = {
        "scheduler/scheduler_config.json", "tokenizer/vocab.json",     "tokenizer/merges.txt",
        "tokenizer_2/spiece.model",        "text_encoder/config.json", "text_encoder_2/config.json",
        "transformer/config.json",         "vae/config.json"};
    const struct model_parts parts = {m->clip, m->t5, m->dit, m->vae};
    uint8_t digest[32], bytes[4096];
    char path[1024];
    EVP_MD_CTX *md = EVP_MD_CTX_new();
    EVP_DigestInit_ex(md, EVP_sha256(), NULL);
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        FILE *f = fopen(part(path, m->dir, files[i]), "rbe");
        EVP_DigestUpdate(md, files[i], strlen(files[i]));
        for (size_t n; f && (n = fread(bytes, 1, sizeof bytes, f)) > 0;)
            EVP_DigestUpdate(md, bytes, n);
        if (f)
            fclose(f);
    }
    for (enum model_part p = 0; p < PARTS; p++) {
        weights_fingerprint(weights_of(&parts, p), digest);
        EVP_DigestUpdate(md, digest, sizeof digest);
    }
    EVP_DigestFinal_ex(md, digest, NULL);
    EVP_MD_CTX_free(md);
    for (int i = 0; i < 32; i++)
        snprintf(m->hash + 2 * i, 3, "%02x", digest[i]);
}

static int load_part(const struct model *m, enum model_part which, const struct home *home, struct model_parts *to,
                     struct err *err)
{
    char path[1024];
    part(path, m->dir, model_part_name(which));
    switch (which) {
    case PART_CLIP:
        return clip_load(path, home, &to->clip, err);
    case PART_T5:
        return t5_load(path, home, &to->t5, err);
    case PART_DIT:
        return flux_load(path, *m->transformer ? m->transformer : NULL, home, &to->dit, err);
    default:
        return vae_load(path, home, &to->vae, err);
    }
}

static void free_part(struct model_parts *of, enum model_part which)
{
    switch (which) {
    case PART_CLIP:
        clip_free(of->clip);
        break;
    case PART_T5:
        t5_free(of->t5);
        break;
    case PART_DIT:
        if (of->dit)
            of->dit->ops->free(of->dit);
        break;
    default:
        vae_free(of->vae);
    }
}

static struct model_parts parts_of(const struct model *m)
{
    return (struct model_parts){m->clip, m->t5, m->dit, m->vae};
}

static void use(struct model *m, enum model_part which, const struct model_parts *from)
{
    if (which == PART_CLIP)
        m->clip = from->clip;
    if (which == PART_T5)
        m->t5 = from->t5;
    if (which == PART_DIT)
        m->dit = from->dit;
    if (which == PART_VAE)
        m->vae = from->vae;
}

// A device on which the parts are planned: it computes nothing, and its tensors have the types of the home's.
static int open_plan(struct model *m, struct home *plan, struct err *err)
{
    const struct device_options options = {.threads = 1, .activation = m->home->k->activation};
    m->plan_kernels = malloc(sizeof *m->plan_kernels);
    if (!m->plan_kernels)
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", m->dir);
    *m->plan_kernels = kernels_dry;
    m->plan_kernels->activation = options.activation;
    TRY(kernels_dry.open(&options, &m->plan_device, err));
    *plan = *m->home;
    plan->k = m->plan_kernels;
    plan->d = m->plan_device;
    plan->plan = true;
    plan->twice = false;
    return 0;
}

static int load_or_plan(struct model *m, enum model_part p, const struct home *home, struct err *err)
{
    struct model_parts fresh;
    TRY(load_part(m, p, home, &fresh, err));
    use(m, p, &fresh);
    if (m->plan_kernels)
        m->plans = parts_of(m);
    else
        m->here |= 1U << p;
    m->placed_bytes[p] = weights_placed_bytes(weights_of(&fresh, p));
    return 0;
}

// Whether a transformer that was planned once finds room a second time: where half of the budget stays free, for
// pictures and other models.
static bool room_for_twice(const struct model *m)
{
    const struct residency *r = m->home->residency;
    const int64_t once = residency_all_bytes(r) + model_placed_bytes(m, PARTS_ALL);
    return once + m->placed_bytes[PART_DIT] <= residency_budget(r) / 2;
}

static int load_parts(struct model *m, struct err *err)
{
    struct home plan, *home = m->home;
    const bool planned = home && home->residency;
    if (planned) {
        TRY(open_plan(m, &plan, err));
        home = &plan;
    }
    for (enum model_part p = 0; p < PARTS; p++)
        TRY(load_or_plan(m, p, home, err));
    if (planned && m->home->twice)
        m->home->twice = plan.twice = room_for_twice(m);
    if (!planned || !plan.twice)
        return 0;
    free_part(&m->plans, PART_DIT);
    m->plans.dit = m->dit = NULL;
    return load_or_plan(m, PART_DIT, &plan, err);
}

static int load(struct model *m, struct err *err)
{
    char path[1024];
    TRY(check_pipeline(m->dir, err));
    TRY(sampler_load(part(path, m->dir, "scheduler"), &m->sampler, err));
    if (!m->home || !m->home->invention) { // else token ids are invented as well
        TRY(clip_tokenizer_load(part(path, m->dir, "tokenizer"), &m->clip_tokenizer, err));
        TRY(t5_tokenizer_load(part(path, m->dir, "tokenizer_2"), &m->t5_tokenizer, err));
        TRY(find_transformer(m, err));
    }
    TRY(load_parts(m, err));
    m->dit->ops->info(m->dit, &m->info);
    m->side_multiple = 2 * vae_scale(m->vae);
    TRY(check_fit(m, err));
    TRY(load_limits(m, err));
    fingerprint(m);
    if (!m->home || !m->home->residency)
        return 0;
    TRY(residency_join(m->home->residency, m, err));
    return residency_fill(m->home->residency, m, err);
}

int model_load(const char *dir, struct model **out, struct err *err)
{
    return model_load_on(dir, NULL, out, err);
}

int model_load_on(const char *dir, const struct home *home, struct model **out, struct err *err)
{
    *out = NULL;
    if (strlen(dir) > MAX_DIR)
        return err_set(err, ERR_INVALID, "model directory %.80s...: path longer than %d bytes", dir, MAX_DIR);
    struct model *m = calloc(1, sizeof *m);
    bool room = m && (m->dir = strdup(dir));
    if (room && home)
        room = (m->home = malloc(sizeof *m->home)) != NULL;
    if (!room) {
        model_free(m);
        return err_set(err, ERR_NO_MEMORY, "%s: out of memory", dir);
    }
    if (home)
        *m->home = *home;
    int rc = load(m, err);
    if (rc != 0) {
        model_free(m);
        return rc;
    }
    *out = m;
    return 0;
}

void model_free(struct model *m)
{
    if (!m)
        return;
    if (m->home && m->home->residency)
        residency_leave(m->home->residency, m);
    clip_tokenizer_free(m->clip_tokenizer);
    t5_tokenizer_free(m->t5_tokenizer);
    struct model_parts now = parts_of(m);
    for (enum model_part p = 0; p < PARTS; p++) {
        if (!m->plan_kernels || m->here & 1U << p)
            free_part(&now, p);
        free_part(&m->plans, p);
    }
    if (m->plan_device)
        kernels_dry.close(m->plan_device);
    free(m->plan_kernels);
    free(m->home);
    free(m->dir);
    free(m);
}

int model_save(const struct model *m, const char *dir, struct err *err)
{
    static const char *const stems[PARTS] = {"model", "model", "diffusion_pytorch_model", "diffusion_pytorch_model"};
    const struct model_parts parts = parts_of(m);
    char path[1024], file[1024 + 64];
    int rc = 0, done = 0;
    if (strlen(dir) > MAX_DIR)
        return err_set(err, ERR_INVALID, "model directory %.80s...: path longer than %d bytes", dir, MAX_DIR);
    for (; done < PARTS; done++) {
        const enum model_part p = (enum model_part)done;
        rc = weights_save(weights_of(&parts, p), part(path, dir, model_part_name(p)), stems[p], err);
        if (rc != 0)
            break;
    }
    while (rc != 0 && done-- > 0) { // half a model would be in the way of the next try
        part(path, dir, model_part_name((enum model_part)done));
        snprintf(file, sizeof file, "%s/%s.safetensors", path, stems[done]);
        unlink(file);
    }
    return rc;
}

int model_bring(struct model *m, enum model_part which, struct err *err)
{
    struct model_parts fresh;
    TRY(load_part(m, which, m->home, &fresh, err));
    use(m, which, &fresh);
    m->here |= 1U << which;
    m->placed_bytes[which] = weights_placed_bytes(weights_of(&fresh, which)); // as planned, or what became of the plan
    return 0;
}

void model_evict(struct model *m, enum model_part which)
{
    struct model_parts now = parts_of(m);
    use(m, which, &m->plans);
    m->here &= ~(1U << which);
    free_part(&now, which);
}

const struct weights *model_weights(const struct model *m, enum model_part p)
{
    const struct model_parts now = parts_of(m);
    return weights_of(&now, p);
}

int64_t model_part_bytes(const struct model *m, enum model_part p)
{
    return weights_bytes(model_weights(m, p));
}

int64_t model_bytes(const struct model *m)
{
    int64_t sum = 0;
    for (enum model_part p = 0; p < PARTS; p++)
        sum += model_part_bytes(m, p);
    return sum;
}

int64_t model_placed_bytes(const struct model *m, unsigned parts)
{
    int64_t sum = 0;
    for (enum model_part p = 0; p < PARTS; p++)
        sum += parts & 1U << p ? m->placed_bytes[p] : 0;
    return sum;
}

const char *model_part_name(enum model_part which)
{
    static const char *const names[PARTS] = {"text_encoder", "text_encoder_2", "transformer", "vae"};
    return names[which];
}

bool job_true_cfg(const Ditfleet__V1__Job *job)
{
    return job->negative_prompt__case != DITFLEET__V1__JOB__NEGATIVE_PROMPT___NOT_SET && job->true_cfg_scale > 1;
}

static void fill_defaults(const struct model_limits *l, Ditfleet__V1__Job *job)
{
    if (!job->width)
        job->width = (uint32_t)l->default_width;
    if (!job->height)
        job->height = (uint32_t)l->default_height;
    if (!job->num_inference_steps)
        job->num_inference_steps = (uint32_t)l->default_num_inference_steps;
    if (!job->max_sequence_length)
        job->max_sequence_length = (uint32_t)l->default_max_sequence_length;
    if (!job->num_images)
        job->num_images = 1;
    if (!job->rng_sm_count)
        job->rng_sm_count = 132;
    if (!job->guidance_scale__case) {
        job->guidance_scale__case = DITFLEET__V1__JOB__GUIDANCE_SCALE__GUIDANCE_SCALE;
        job->guidance_scale = (float)l->default_guidance_scale;
    }
    if (!job->true_cfg_scale__case) {
        job->true_cfg_scale__case = DITFLEET__V1__JOB__TRUE_CFG_SCALE__TRUE_CFG_SCALE;
        job->true_cfg_scale = 1;
    }
}

static int check_size(const struct model *m, const char *field, int64_t side, struct err *err)
{
    const struct model_limits *l = &m->limits;
    if (side % m->side_multiple == 0 && side >= l->min_side && side <= l->max_side)
        return 0;
    return err_set(err, ERR_INVALID, "%s %lld: this model takes multiples of %lld from %lld to %lld", field,
                   (long long)side, (long long)m->side_multiple, (long long)l->min_side, (long long)l->max_side);
}

int model_resolve_job(const struct model *m, Ditfleet__V1__Job *job, struct err *err)
{
    const struct model_limits *l = &m->limits;
    fill_defaults(l, job);
    TRY(check_size(m, "width", job->width, err));
    TRY(check_size(m, "height", job->height, err));
    if ((int64_t)job->width * job->height > l->max_pixels)
        return err_set(err, ERR_INVALID, "width x height is %lld pixels; this model takes at most %lld",
                       (long long)job->width * job->height, (long long)l->max_pixels);
    if (job->max_sequence_length > SEQUENCE_LIMIT)
        return err_set(err, ERR_INVALID, "max_sequence_length %u: this model takes 1 to %d tokens",
                       job->max_sequence_length, SEQUENCE_LIMIT);
    if (job->scheduler && *job->scheduler && strcmp(job->scheduler, "FlowMatchEulerDiscreteScheduler") != 0)
        return err_set(err, ERR_UNSUPPORTED, "scheduler %.60s: this model runs FlowMatchEulerDiscreteScheduler",
                       job->scheduler);
    if (!job->seed__case) {
        job->seed__case = DITFLEET__V1__JOB__SEED__SEED;
        return rng_fresh_seed(&job->seed, err);
    }
    return 0;
}

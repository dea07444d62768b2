// test_model.c: model directories with one thing wrong: each is refused with a sentence that names the file and, where
// there is one, the key or the tensor; and what a model's limits make of a job.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <ftw.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/unit/demo.h"

// The copy of the demo model: links to its files, some of which a test replaces.
static char folder[] = "/tmp/ditfleet-model-XXXXXX";

static const char *at(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static int remove_entry(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    (void)st, (void)kind, (void)ftw;
    return remove(path);
}

static int copy_entry(const char *path, const struct stat *st, int kind, struct FTW *ftw)
{
    char to[512], *from = realpath(path, NULL);
    (void)st, (void)ftw;
    snprintf(to, sizeof to, "%s%s", folder, path + strlen(DEMO_MODEL));
    int rc = kind == FTW_D ? mkdir(to, 0700) : symlink(from, to);
    free(from);
    return rc;
}

static int tear_down(void **state)
{
    (void)state;
    return nftw(folder, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}

static int set_up(void **state)
{
    (void)state;
    tear_down(state);
    return nftw(DEMO_MODEL, copy_entry, 8, 0);
}

// The file as it was.
static void restore(const char *name)
{
    char original[512], *from;
    snprintf(original, sizeof original, DEMO_MODEL "/%s", name);
    from = realpath(original, NULL);
    unlink(at(name));
    if (from)
        assert_int_equal(symlink(from, at(name)), 0);
    free(from);
}

static void put(const char *name, const void *bytes, size_t size)
{
    unlink(at(name));
    FILE *f = fopen(at(name), "wbe");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, size, f), size);
    fclose(f);
}

static void put_text(const char *name, const char *text)
{
    put(name, text, strlen(text));
}

// Replaces key in the JSON file, or drops it when value is NULL.
static void put_key(const char *name, const char *key, const char *value)
{
    json_t *root = json_load_file(at(name), 0, NULL);
    if (!root)
        root = json_object();
    if (value)
        json_object_set_new(root, key, json_loads(value, JSON_DECODE_ANY, NULL));
    else
        json_object_del(root, key);
    char *text = json_dumps(root, 0);
    put_text(name, text);
    free(text);
    json_decref(root);
}

static uint8_t *read_demo(const char *name, size_t *size)
{
    char path[512];
    snprintf(path, sizeof path, DEMO_MODEL "/%s", name);
    FILE *f = fopen(path, "rbe");
    assert_non_null(f);
    fseek(f, 0, SEEK_END);
    *size = (size_t)ftell(f);
    rewind(f);
    uint8_t *bytes = malloc(*size);
    assert_non_null(bytes);
    assert_int_equal(fread(bytes, 1, *size, f), *size);
    fclose(f);
    return bytes;
}

static void expect_refused(enum err_code code, const char *a, const char *b)
{
    struct err err = {.code = ERR_NONE};
    struct model *m = (struct model *)1;
    if (model_load(folder, &m, &err) == 0)
        fail_msg("%s, %s: the model was loaded", a, b);
    assert_null(m);
    if (err.code != code || !strstr(err.text, a) || !strstr(err.text, b))
        fail_msg("%s: \"%s\", expected %s with \"%s\" and \"%s\"", err_name(err.code), err.text, err_name(code), a, b);
}

// ---- directories

static void good(void **state)
{
    (void)state;
    struct err err = {.code = ERR_NONE};
    struct model *m, *original = demo_model();
    if (model_load(folder, &m, &err) != 0)
        fail_msg("%s", err.text);
    assert_string_equal(m->hash, original->hash);
    assert_int_equal(strlen(m->hash), 64);
    assert_int_equal(m->side_multiple, 16);
    assert_int_equal(m->limits.max_side, 2048);
    assert_true(model_bytes(m) > 20 << 20);
    model_free(m);
    model_free(original);
}

// Whatever shapes a picture is in the fingerprint.
static void hash_tells_apart(void **state)
{
    (void)state;
    static const struct {
        const char *file, *key, *value;
    } rows[] = {
        {"scheduler/scheduler_config.json", "max_shift", "1.1"},
        {"vae/config.json", "shift_factor", "0.2"},
        {"text_encoder/config.json", "layer_norm_eps", "1e-6"},
    };
    struct model *original = demo_model(), *m;
    struct err err = {.code = ERR_NONE};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        put_key(rows[i].file, rows[i].key, rows[i].value);
        assert_int_equal(model_load(folder, &m, &err), 0);
        assert_string_not_equal(m->hash, original->hash);
        model_free(m);
        restore(rows[i].file);
    }
    model_free(original);
}

static const char *const files[] = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer_2/spiece.model",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
};

static const char *base_name(const char *path)
{
    return strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
}

static void missing_files(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        unlink(at(files[i]));
        expect_refused(ERR_NOT_FOUND, base_name(files[i]), folder);
        restore(files[i]);
    }
    unlink(at("transformer/diffusion_pytorch_model.safetensors.index.json"));
    expect_refused(ERR_NOT_FOUND, "transformer", "diffusion_pytorch_model.safetensors.index.json");
}

static void no_directory(void **state)
{
    (void)state;
    struct err err = {.code = ERR_NONE};
    struct model *m;
    char path[4000];
    assert_int_equal(model_load("/tmp/ditfleet-no-such-model", &m, &err), ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, "/tmp/ditfleet-no-such-model"));
    memset(path, 'p', sizeof path - 1);
    path[sizeof path - 1] = 0;
    assert_int_equal(model_load(path, &m, &err), ERR_INVALID);
    assert_non_null(strstr(err.text, "path longer than"));
}

// Cut short at some places, and empty.
static void short_files(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        if (strstr(files[i], "merges.txt"))
            continue; // fewer merges are merges too
        size_t size;
        uint8_t *bytes = read_demo(files[i], &size);
        const size_t lengths[] = {0, 1, 7, 8, size / 3, size - 1};
        const bool weights = strstr(files[i], ".safetensors") != NULL;
        for (size_t j = 0; j < sizeof lengths / sizeof *lengths; j++) {
            if (lengths[j] == size - 1 && !weights)
                continue; // a last newline
            put(files[i], bytes, lengths[j]);
            expect_refused(ERR_CORRUPT, base_name(files[i]), folder);
        }
        free(bytes);
        restore(files[i]);
    }
}

static void not_json(void **state)
{
    (void)state;
    static const char *const texts[] = {"nonsense", "[1, 2]", "{\"a\": 1", "7", "{\"a\": 1, \"a\": 2}", "\xff"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        if (!strstr(files[i], "config.json") && !strstr(files[i], "index.json"))
            continue;
        for (size_t j = 0; j < sizeof texts / sizeof *texts; j++) {
            put_text(files[i], texts[j]);
            expect_refused(ERR_CORRUPT, base_name(files[i]), "not a JSON object");
        }
        restore(files[i]);
    }
}

// One key changed.
static void wrong_keys(void **state)
{
    (void)state;
    static const struct {
        const char *file, *key, *value;
        enum err_code code;
        const char *a, *b;
    } rows[] = {
#define TW "transformer/diffusion_pytorch_model"
        {"model_index.json", "_class_name", "\"StableDiffusionPipeline\"", ERR_UNSUPPORTED, "model_index.json",
         "_class_name is \"StableDiffusionPipeline\"; supported: \"FluxPipeline\""},
        {"model_index.json", "_class_name", NULL, ERR_UNSUPPORTED, "model_index.json", "_class_name is \"\""},
        {"model_index.json", "_class_name", "7", ERR_UNSUPPORTED, "model_index.json", "_class_name"},
        {"transformer/config.json", "_class_name", "\"SD3Transformer2DModel\"", ERR_UNSUPPORTED,
         "transformer/config.json", "_class_name"},
        {"transformer/config.json", "num_layers", NULL, ERR_INVALID, "transformer/config.json",
         "num_layers is missing"},
        {"transformer/config.json", "num_layers", "\"2\"", ERR_INVALID, "transformer/config.json",
         "num_layers must be a whole number from 0 to 256"},
        {"transformer/config.json", "num_layers", "1000000", ERR_INVALID, "transformer/config.json", "num_layers"},
        {"transformer/config.json", "num_layers", "3", ERR_CORRUPT, TW, "tensor transformer_blocks.2."},
        {"transformer/config.json", "num_layers", "1", ERR_CORRUPT, TW, "by the configuration's num_layers"},
        {"transformer/config.json", "num_single_layers", "5", ERR_CORRUPT, TW, "single_transformer_blocks.4."},
        {"transformer/config.json", "num_single_layers", "0", ERR_CORRUPT, TW, "num_single_layers"},
        {"transformer/config.json", "num_attention_heads", "4", ERR_CORRUPT, TW,
         "but the configuration implies [768, 128]"},
        {"transformer/config.json", "num_attention_heads", "0", ERR_INVALID, "transformer/config.json",
         "num_attention_heads"},
        {"transformer/config.json", "attention_head_dim", "16", ERR_INVALID, "transformer/config.json",
         "axes_dims_rope must be 3 even numbers that add up to attention_head_dim 16"},
        {"transformer/config.json", "axes_dims_rope", "[8, 12, 14]", ERR_INVALID, "transformer/config.json",
         "axes_dims_rope"},
        {"transformer/config.json", "axes_dims_rope", "[7, 12, 13]", ERR_INVALID, "transformer/config.json",
         "axes_dims_rope"},
        {"transformer/config.json", "axes_dims_rope", "[16, 16]", ERR_INVALID, "transformer/config.json",
         "axes_dims_rope"},
        {"transformer/config.json", "axes_dims_rope", "[2,2,2,2,24]", ERR_INVALID, "transformer/config.json",
         "axes_dims_rope must be a list of 1 to 3"},
        {"transformer/config.json", "axes_dims_rope", "32", ERR_INVALID, "transformer/config.json", "axes_dims_rope"},
        {"transformer/config.json", "in_channels", "32", ERR_CORRUPT, TW, "x_embedder.weight has shape [256, 64]"},
        {"transformer/config.json", "out_channels", "32", ERR_INVALID, "transformer/config.json", "out_channels"},
        {"transformer/config.json", "patch_size", "2", ERR_INVALID, "transformer/config.json", "patch_size"},
        {"transformer/config.json", "joint_attention_dim", "100", ERR_CORRUPT, TW, "context_embedder.weight"},
        {"transformer/config.json", "pooled_projection_dim", "64", ERR_CORRUPT, TW, "text_embedder.linear_1.weight"},
        {"transformer/config.json", "guidance_embeds", "false", ERR_CORRUPT, TW, "guidance_embeds"},
        {"transformer/config.json", "guidance_embeds", "1", ERR_INVALID, "transformer/config.json",
         "guidance_embeds must be true or false"},
        {"vae/config.json", "_class_name", "\"AutoencoderTiny\"", ERR_UNSUPPORTED, "vae/config.json", "_class_name"},
        {"vae/config.json", "latent_channels", "8", ERR_CORRUPT, "vae/diffusion", "decoder.conv_in.weight"},
        {"vae/config.json", "block_out_channels", "[32, 64, 96]", ERR_CORRUPT, "vae/diffusion", "decoder.up_blocks"},
        {"vae/config.json", "block_out_channels", "[32, 64, 96, 96, 96]", ERR_CORRUPT, "vae/diffusion",
         "decoder.up_blocks"},
        {"vae/config.json", "block_out_channels", "[]", ERR_INVALID, "vae/config.json", "block_out_channels"},
        {"vae/config.json", "block_out_channels", "[32, 64, 96, \"96\"]", ERR_INVALID, "vae/config.json",
         "block_out_channels"},
        {"vae/config.json", "norm_num_groups", "7", ERR_INVALID, "vae/config.json", "norm_num_groups"},
        {"vae/config.json", "norm_num_groups", "0", ERR_INVALID, "vae/config.json", "norm_num_groups"},
        {"vae/config.json", "layers_per_block", "2", ERR_CORRUPT, "vae/diffusion", "resnets.2"},
        {"vae/config.json", "layers_per_block", "9", ERR_INVALID, "vae/config.json", "layers_per_block"},
        {"vae/config.json", "out_channels", "4", ERR_INVALID, "vae/config.json", "out_channels"},
        {"vae/config.json", "scaling_factor", "0", ERR_INVALID, "vae/config.json", "scaling_factor"},
        {"vae/config.json", "act_fn", "\"relu\"", ERR_UNSUPPORTED, "vae/config.json", "act_fn"},
        {"vae/config.json", "latents_mean", "[0.1]", ERR_UNSUPPORTED, "vae/config.json", "latents_mean"},
        {"vae/config.json", "use_post_quant_conv", "true", ERR_CORRUPT, "vae/diffusion", "post_quant_conv.weight"},
        {"vae/config.json", "mid_block_add_attention", "false", ERR_CORRUPT, "vae/diffusion",
         "mid_block_add_attention"},
        {"text_encoder/config.json", "model_type", "\"bert\"", ERR_UNSUPPORTED, "text_encoder/config.json",
         "model_type"},
        {"text_encoder/config.json", "hidden_size", "64", ERR_CORRUPT, "text_encoder/model.safetensors",
         "token_embedding.weight has shape [2014, 128]"},
        {"text_encoder/config.json", "num_hidden_layers", "3", ERR_CORRUPT, "text_encoder/model.safetensors",
         "layers.2."},
        {"text_encoder/config.json", "num_hidden_layers", "1", ERR_CORRUPT, "text_encoder/model.safetensors",
         "num_hidden_layers"},
        {"text_encoder/config.json", "num_attention_heads", "3", ERR_INVALID, "text_encoder/config.json",
         "num_attention_heads"},
        {"text_encoder/config.json", "intermediate_size", "256", ERR_CORRUPT, "text_encoder/model.safetensors",
         "mlp.fc1.weight"},
        {"text_encoder/config.json", "vocab_size", "2013", ERR_CORRUPT, "text_encoder/model.safetensors",
         "token_embedding.weight"},
        {"text_encoder/config.json", "max_position_embeddings", "76", ERR_CORRUPT, "text_encoder/model.safetensors",
         "position_embedding.weight"},
        {"text_encoder/config.json", "hidden_act", "\"relu\"", ERR_UNSUPPORTED, "text_encoder/config.json",
         "hidden_act"},
        {"text_encoder/config.json", "eos_token_id", "99999", ERR_INVALID, "text_encoder/config.json", "eos_token_id"},
        {"text_encoder_2/config.json", "d_model", "100", ERR_CORRUPT, "text_encoder_2/model", "shared.weight"},
        {"text_encoder_2/config.json", "d_kv", "16", ERR_CORRUPT, "text_encoder_2/model", "SelfAttention.q.weight"},
        {"text_encoder_2/config.json", "num_heads", "5", ERR_CORRUPT, "text_encoder_2/model",
         "relative_attention_bias.weight"},
        {"text_encoder_2/config.json", "num_layers", "4", ERR_CORRUPT, "text_encoder_2/model", "encoder.block.3."},
        {"text_encoder_2/config.json", "num_layers", "2", ERR_CORRUPT, "text_encoder_2/model", "num_layers"},
        {"text_encoder_2/config.json", "d_ff", "385", ERR_CORRUPT, "text_encoder_2/model", "wi_0.weight"},
        {"text_encoder_2/config.json", "vocab_size", "2000", ERR_CORRUPT, "text_encoder_2/model", "shared.weight"},
        {"text_encoder_2/config.json", "relative_attention_num_buckets", "16", ERR_CORRUPT, "text_encoder_2/model",
         "relative_attention_bias.weight"},
        {"text_encoder_2/config.json", "relative_attention_max_distance", "8", ERR_INVALID,
         "text_encoder_2/config.json", "relative_attention_max_distance"},
        {"text_encoder_2/config.json", "feed_forward_proj", "\"relu\"", ERR_UNSUPPORTED, "text_encoder_2/config.json",
         "feed_forward_proj"},
        {"scheduler/scheduler_config.json", "_class_name", "\"DDIMScheduler\"", ERR_UNSUPPORTED,
         "scheduler/scheduler_config.json", "_class_name"},
        {"ditfleet.json", "max_side", "\"big\"", ERR_INVALID, "ditfleet.json", "max_side must be a whole number"},
        {"ditfleet.json", "max_side", "8", ERR_INVALID, "ditfleet.json", "max_side"},
        {"ditfleet.json", "max_sides", "512", ERR_INVALID, "ditfleet.json", "max_sides is no key"},
        {"ditfleet.json", "min_side", "0", ERR_INVALID, "ditfleet.json", "min_side"},
        {"ditfleet.json", "min_side", "512", ERR_INVALID, "ditfleet.json", "default_width 256"},
        {"ditfleet.json", "default_height", "250", ERR_INVALID, "ditfleet.json",
         "default_height 250 must be a multiple of 16"},
        {"ditfleet.json", "max_pixels", "65535", ERR_INVALID, "ditfleet.json", "max_pixels 65535"},
        {"ditfleet.json", "default_num_inference_steps", "0", ERR_INVALID, "ditfleet.json",
         "default_num_inference_steps must be a whole number from 1 to"},
        {"ditfleet.json", "default_max_sequence_length", "513", ERR_INVALID, "ditfleet.json",
         "default_max_sequence_length"},
        {"ditfleet.json", "default_guidance_scale", "-1", ERR_INVALID, "ditfleet.json", "default_guidance_scale"},
        {"ditfleet.json", "precision", "\"fp4\"", ERR_INVALID, "ditfleet.json",
         "precision is \"fp4\"; allowed: default, fp32, bf16, fp16, fp8, int8"},
        {"ditfleet.json", "precision", "8", ERR_INVALID, "ditfleet.json", "precision is \"\""},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        put_key(rows[i].file, rows[i].key, rows[i].value);
        expect_refused(rows[i].code, rows[i].a, rows[i].b);
        restore(rows[i].file);
    }
}

// Parts that are each well but not made for each other: the ids of one exceed the other's table.
static void parts_of_others(void **state)
{
    (void)state;
    json_t *vocabulary = json_load_file(at("tokenizer/vocab.json"), 0, NULL);
    json_object_set_new(vocabulary, "beyond</w>", json_integer(2014));
    char *text = json_dumps(vocabulary, 0);
    put_text("tokenizer/vocab.json", text);
    expect_refused(ERR_INVALID, "tokenizer makes ids up to 2014", "text_encoder's vocab_size is 2014");
    free(text);
    json_decref(vocabulary);
}

// Damaged bytes in the sentencepiece model and in vocabularies: refused, or still a tokenizer; never a crash.
static void damaged_tokenizers(void **state)
{
    (void)state;
    static const char *const names[] = {"tokenizer_2/spiece.model", "tokenizer/vocab.json", "tokenizer/merges.txt"};
    enum { ROUNDS = SANITIZED ? 10 : 40 };
    uint32_t random = 99;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        size_t size;
        uint8_t *bytes = read_demo(names[i], &size);
        for (int round = 0; round < ROUNDS; round++) {
            uint8_t kept[8];
            size_t where[8];
            for (int j = 0; j < 8; j++) {
                random = random * 1664525 + 1013904223;
                where[j] = (random >> 4) % size;
                kept[j] = bytes[where[j]];
                bytes[where[j]] ^= (uint8_t)(1 << (random % 8));
            }
            put(names[i], bytes, size);
            struct err err = {.code = ERR_NONE};
            struct model *m;
            if (model_load(folder, &m, &err) == 0)
                model_free(m);
            else
                assert_true(err.text[0]);
            for (int j = 7; j >= 0; j--)
                bytes[where[j]] = kept[j];
        }
        free(bytes);
        restore(names[i]);
    }
}

// ---- jobs

static void defaults(void **state)
{
    (void)state;
    struct model *m = demo_model();
    Ditfleet__V1__Job *job = demo_job(m, (const char *const[]){"prompt", "a ring", NULL});
    assert_int_equal(job->width, 256);
    assert_int_equal(job->height, 256);
    assert_int_equal(job->num_inference_steps, 20);
    assert_int_equal(job->max_sequence_length, 128);
    assert_int_equal(job->num_images, 1);
    assert_true(job->guidance_scale == 3.5F);
    assert_true(job->true_cfg_scale == 1);
    assert_int_equal(job->seed__case, DITFLEET__V1__JOB__SEED__SEED);
    assert_false(job_true_cfg(job));
    Ditfleet__V1__Job *again = demo_job(m, (const char *const[]){"prompt", "a ring", "guidance_scale", "0", NULL});
    assert_true(again->seed != job->seed); // drawn
    assert_true(again->guidance_scale == 0);
    job_free(job);
    job_free(again);
    model_free(m);
}

static void branches(void **state)
{
    (void)state;
    struct model *m = demo_model();
    static const struct {
        const char *fields[8];
        bool two;
    } rows[] = {
        {{"true_cfg_scale", "3", NULL}, false},
        {{"negative_prompt", "a star", NULL}, false},
        {{"negative_prompt", "a star", "true_cfg_scale", "1", NULL}, false},
        {{"negative_prompt", "a star", "true_cfg_scale", "1.01", NULL}, true},
        {{"negative_prompt", "", "true_cfg_scale", "3", NULL}, true},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Ditfleet__V1__Job *job = demo_job(m, rows[i].fields);
        assert_int_equal(job_true_cfg(job), rows[i].two);
        job_free(job);
    }
    model_free(m);
}

static void bounds(void **state)
{
    (void)state;
    static const struct {
        const char *fields[8];
        enum err_code code;
        const char *text;
    } rows[] = {
        {{"width", "250", NULL}, ERR_INVALID, "width 250: this model takes multiples of 16 from 16 to 2048"},
        {{"height", "264", NULL}, ERR_INVALID, "height 264"},
        {{"width", "2064", NULL}, ERR_INVALID, "width 2064"},
        {{"width", "2048", "height", "528", NULL}, ERR_INVALID, "1081344 pixels; this model takes at most 1048576"},
        {{"max_sequence_length", "512", "width", "2048", "height", "512", NULL}, ERR_NONE, ""},
        {{"width", "16", "height", "16", "max_sequence_length", "1", NULL}, ERR_NONE, ""},
        {{"scheduler", "FlowMatchEulerDiscreteScheduler", NULL}, ERR_NONE, ""},
    };
    struct model *m = demo_model();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct err err = {.code = ERR_NONE};
        Ditfleet__V1__Job *job = job_new();
        for (const char *const *f = rows[i].fields; *f; f += 2)
            assert_int_equal(job_set_field(job, f[0], f[1], &err), 0);
        assert_int_equal(model_resolve_job(m, job, &err), rows[i].code);
        if (rows[i].code && !strstr(err.text, rows[i].text))
            fail_msg("\"%s\" does not say \"%s\"", err.text, rows[i].text);
        job_free(job);
    }
    Ditfleet__V1__Job *job = job_new(); // past the table's own bounds, as a job made by hand may be
    struct err err;
    job->max_sequence_length = 513;
    assert_int_equal(model_resolve_job(m, job, &err), ERR_INVALID);
    assert_non_null(strstr(err.text, "max_sequence_length 513: this model takes 1 to 512"));
    job->max_sequence_length = 0;
    job->width = UINT32_MAX;
    assert_int_equal(model_resolve_job(m, job, &err), ERR_INVALID);
    job->width = 0;
    char other[] = "DDIMScheduler", *kept = job->scheduler;
    job->scheduler = other;
    assert_int_equal(model_resolve_job(m, job, &err), ERR_UNSUPPORTED);
    assert_non_null(strstr(err.text, "scheduler DDIMScheduler"));
    job->scheduler = kept;
    job_free(job);
    model_free(m);
}

// ---- precision

#define P(name) DITFLEET__V1__PRECISION__PRECISION_##name

// A job's precision, and the model's where the job leaves it open, on a device with a choice and on one without.
static void precisions(void **state)
{
    (void)state;
    static const struct {
        Ditfleet__V1__Precision wanted, preferred;
        struct precision gpu, cpu;
        bool refused; // on the CPU
    } rows[] = {
        {P(DEFAULT), P(DEFAULT), {DT_BF16, DT_BF16}, {DT_F32, DT_F32}, false},
        {P(DEFAULT), P(FP8), {DT_BF16, DT_E4M3}, {DT_F32, DT_F32}, false},
        {P(DEFAULT), P(FP16), {DT_F16, DT_F16}, {DT_F32, DT_F32}, false},
        {P(BF16), P(FP8), {DT_BF16, DT_BF16}, {DT_F32, DT_F32}, true},
        {P(FP16), P(DEFAULT), {DT_F16, DT_F16}, {DT_F32, DT_F32}, true},
        {P(FP8), P(DEFAULT), {DT_BF16, DT_E4M3}, {DT_F32, DT_F32}, true},
        {P(INT8), P(FP8), {DT_BF16, DT_I8}, {DT_F32, DT_F32}, true},
        {P(DEFAULT), P(INT8), {DT_BF16, DT_I8}, {DT_F32, DT_F32}, false},
        {P(FP32), P(FP8), {DT_F32, DT_F32}, {DT_F32, DT_F32}, false},
    };
    struct kernels gpu = kernels_dry;
    gpu.activation = DT_BF16;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct precision p;
        struct err err = {.code = ERR_NONE};
        assert_int_equal(precision_of(&gpu, rows[i].wanted, rows[i].preferred, &p, &err), 0);
        assert_int_equal(p.activation, rows[i].gpu.activation);
        assert_int_equal(p.codes, rows[i].gpu.codes);
        assert_int_equal(precision_of(&kernels_cpu, rows[i].wanted, rows[i].preferred, &p, &err),
                         rows[i].refused ? ERR_UNSUPPORTED : 0);
        if (rows[i].refused)
            assert_non_null(strstr(err.text, "on cpu there is fp32"));
        else
            assert_int_equal(p.activation, rows[i].cpu.activation);
    }
    put_key("ditfleet.json", "precision", "\"fp8\"");
    struct err err = {.code = ERR_NONE};
    struct model *m;
    if (model_load(folder, &m, &err) != 0)
        fail_msg("%s", err.text);
    assert_int_equal(m->limits.precision, P(FP8));
    model_free(m);
    restore("ditfleet.json");
}

int main(void)
{
    if (!mkdtemp(folder))
        return 1;
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, NULL)
    const struct CMUnitTest tests[] = {
        TEST(good),
        TEST(hash_tells_apart),
        TEST(missing_files),
        TEST(no_directory),
        TEST(short_files),
        TEST(not_json),
        TEST(wrong_keys),
        TEST(parts_of_others),
        TEST(damaged_tokenizers),
        TEST(precisions),
        cmocka_unit_test(defaults),
        cmocka_unit_test(branches),
        cmocka_unit_test(bounds),
    };
    return cmocka_run_group_tests(tests, NULL, tear_down);
}

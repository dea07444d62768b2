// architectures.c: the configurations of the models that `ditfleet bench` knows by name: what the published
// checkpoints' configuration files say, as far as it is read here.
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "worker/invent.h"

enum { FILES = 7, MAX_PATH = 1024, MAX_DIR = 900 };

static const char *const paths[FILES] = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "transformer/config.json",
    "vae/config.json",
    "ditfleet.json",
};
static const char *const folders[] = {"scheduler", "text_encoder", "text_encoder_2", "transformer", "vae"};

struct architecture {
    size_t largest; // bytes of the largest tensor
    const char *files[FILES];
};

#define INDEX "{\"_class_name\": \"FluxPipeline\"}"
#define CLIP_L                                                                                                         \
    "{\"model_type\": \"clip_text_model\", \"num_hidden_layers\": 12, \"num_attention_heads\": 12,"                    \
    " \"hidden_size\": 768, \"intermediate_size\": 3072, \"max_position_embeddings\": 77, \"vocab_size\": 49408,"      \
    " \"eos_token_id\": 49407, \"hidden_act\": \"quick_gelu\", \"layer_norm_eps\": 1e-05}"
#define T5_XXL                                                                                                         \
    "{\"model_type\": \"t5\", \"feed_forward_proj\": \"gated-gelu\", \"num_layers\": 24, \"num_heads\": 64,"           \
    " \"d_kv\": 64, \"d_model\": 4096, \"d_ff\": 10240, \"vocab_size\": 32128, \"layer_norm_epsilon\": 1e-06,"         \
    " \"relative_attention_num_buckets\": 32, \"relative_attention_max_distance\": 128}"
#define FLUX_12B(guidance)                                                                                             \
    "{\"_class_name\": \"FluxTransformer2DModel\", \"num_layers\": 19, \"num_single_layers\": 38,"                     \
    " \"attention_head_dim\": 128, \"num_attention_heads\": 24, \"joint_attention_dim\": 4096,"                        \
    " \"pooled_projection_dim\": 768, \"guidance_embeds\": " guidance ", \"in_channels\": 64,"                         \
    " \"axes_dims_rope\": [16, 56, 56]}"
#define FLUX_VAE                                                                                                       \
    "{\"_class_name\": \"AutoencoderKL\", \"act_fn\": \"silu\", \"latent_channels\": 16, \"out_channels\": 3,"         \
    " \"layers_per_block\": 2, \"norm_num_groups\": 32, \"block_out_channels\": [128, 256, 512, 512],"                 \
    " \"scaling_factor\": 0.3611, \"shift_factor\": 0.1159, \"use_post_quant_conv\": false,"                           \
    " \"mid_block_add_attention\": true}"
#define SCHEDULER(dynamic, shift)                                                                                      \
    "{\"_class_name\": \"FlowMatchEulerDiscreteScheduler\", \"use_dynamic_shifting\": " dynamic ", \"shift\": " shift  \
    ", \"base_shift\": 0.5, \"max_shift\": 1.15}"

const char *const architecture_names[] = {"flux.1-dev", "flux.1-schnell", "demo", NULL};

// In the order of architecture_names.
static const struct architecture architectures[] = {
    {.largest = (size_t)32128 * 4096 * 2,
     .files = {INDEX, SCHEDULER("true", "3.0"), CLIP_L, T5_XXL, FLUX_12B("true"), FLUX_VAE, "{}"}},
    {.largest = (size_t)32128 * 4096 * 2,
     .files = {INDEX, SCHEDULER("false", "1.0"), CLIP_L, T5_XXL, FLUX_12B("false"), FLUX_VAE,
               "{\"default_num_inference_steps\": 4, \"default_max_sequence_length\": 256,"
               " \"default_guidance_scale\": 0}"}},
    {.largest = (size_t)2112 * 192 * 2 * 2,
     .files = {INDEX, SCHEDULER("true", "3.0"),
               "{\"model_type\": \"clip_text_model\", \"num_hidden_layers\": 2, \"num_attention_heads\": 4,"
               " \"hidden_size\": 128, \"intermediate_size\": 512, \"max_position_embeddings\": 77,"
               " \"vocab_size\": 2014, \"eos_token_id\": 2013, \"hidden_act\": \"quick_gelu\"}",
               "{\"model_type\": \"t5\", \"feed_forward_proj\": \"gated-gelu\", \"num_layers\": 3, \"num_heads\": 6,"
               " \"d_kv\": 32, \"d_model\": 192, \"d_ff\": 384, \"vocab_size\": 2112}",
               "{\"_class_name\": \"FluxTransformer2DModel\", \"num_layers\": 2, \"num_single_layers\": 4,"
               " \"attention_head_dim\": 32, \"num_attention_heads\": 8, \"joint_attention_dim\": 192,"
               " \"pooled_projection_dim\": 128, \"guidance_embeds\": true, \"in_channels\": 64,"
               " \"axes_dims_rope\": [8, 12, 12]}",
               "{\"_class_name\": \"AutoencoderKL\", \"act_fn\": \"silu\", \"latent_channels\": 16,"
               " \"out_channels\": 3, \"layers_per_block\": 1, \"norm_num_groups\": 16,"
               " \"block_out_channels\": [32, 64, 96, 96], \"scaling_factor\": 0.6245, \"shift_factor\": 0.0057,"
               " \"use_post_quant_conv\": false, \"mid_block_add_attention\": true}",
               "{\"default_width\": 256, \"default_height\": 256, \"default_num_inference_steps\": 20,"
               " \"default_max_sequence_length\": 128, \"min_side\": 16, \"max_side\": 2048}"}},
};

// NULL: there is none, and err says which there are.
static const struct architecture *find(const char *name, struct err *err)
{
    char known[256] = "";
    for (int i = 0; architecture_names[i]; i++) {
        if (strcmp(architecture_names[i], name) == 0)
            return &architectures[i];
        snprintf(known + strlen(known), sizeof known - strlen(known), "%s%s", i ? ", " : "", architecture_names[i]);
    }
    err_set(err, ERR_INVALID, "architecture %.60s: it may be %s", name, known);
    return NULL;
}

static int write_text(const char *dir, const char *file, const char *text, struct err *err)
{
    char path[MAX_PATH];
    snprintf(path, sizeof path, "%s/%s", dir, file);
    FILE *f = fopen(path, "wxe");
    if (!f && errno == EEXIST)
        return err_set(err, ERR_INVALID, "%.300s: is there already; nothing is overwritten: name another directory",
                       path);
    bool ok = f && fputs(text, f) >= 0;
    if (f)
        ok = fclose(f) == 0 && ok;
    if (ok)
        return 0;
    err_set(err, ERR_IO, "%.300s: cannot be written (%s)", path, strerror(errno));
    if (f)
        unlink(path);
    return ERR_IO;
}

// A folder that holds nothing: what is there would be taken for a part of the model.
static int make_folder(const char *dir, const char *name, struct err *err)
{
    char path[MAX_PATH], found[64] = "";
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (mkdir(path, 0777) == 0)
        return 0;
    DIR *there = errno == EEXIST ? opendir(path) : NULL;
    if (!there)
        return err_set(err, ERR_IO, "%.300s: cannot be made (%s)", path, strerror(errno));
    for (const struct dirent *e; !found[0] && (e = readdir(there));)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            snprintf(found, sizeof found, "%.60s", e->d_name);
    closedir(there);
    return found[0] ? err_set(err, ERR_INVALID,
                              "%.300s: holds %s already; nothing is overwritten: name another directory", path, found)
                    : 0;
}

// The first n files, and the folders that are empty then.
static void clear(const char *dir, int n)
{
    char path[MAX_PATH];
    for (int i = 0; i < n; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, paths[i]);
        unlink(path);
    }
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, folders[i]);
        rmdir(path);
    }
}

int architecture_write(const char *name, const char *dir, size_t *largest, struct err *err)
{
    const struct architecture *a = find(name, err);
    int rc = 0, written = 0;
    if (!a)
        return err->code;
    if (strlen(dir) > MAX_DIR)
        return err_set(err, ERR_INVALID, "%.80s...: path longer than %d bytes", dir, MAX_DIR);
    for (size_t i = 0; rc == 0 && i < sizeof folders / sizeof *folders; i++)
        rc = make_folder(dir, folders[i], err);
    while (rc == 0 && written < FILES) {
        rc = write_text(dir, paths[written], a->files[written], err);
        written += rc == 0;
    }
    if (rc != 0)
        clear(dir, written);
    *largest = a->largest;
    return rc;
}

void architecture_remove(const char *dir)
{
    clear(dir, FILES);
}

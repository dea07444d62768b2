// original.c: the names of https://github.com/black-forest-labs/flux (src/flux/model.py, modules/layers.py), fetched by
// diffusers' of the same numbers (scripts/convert_flux_to_diffusers.py says which).
#include "worker/original.h"

#include <stdio.h>
#include <string.h>

const char *const original_prefixes[] = {"", "model.diffusion_model.", NULL};

// # is a block's number. Names that do not end in a tensor's own are of layers: .weight and .bias follow.
static const struct {
    const char *diffusers, *original;
    int first, rows, whole;
    bool swapped;
} names[] = {
    {"x_embedder", "img_in", 0, 1, 1, false},
    {"context_embedder", "txt_in", 0, 1, 1, false},
    {"time_text_embed.timestep_embedder.linear_1", "time_in.in_layer", 0, 1, 1, false},
    {"time_text_embed.timestep_embedder.linear_2", "time_in.out_layer", 0, 1, 1, false},
    {"time_text_embed.text_embedder.linear_1", "vector_in.in_layer", 0, 1, 1, false},
    {"time_text_embed.text_embedder.linear_2", "vector_in.out_layer", 0, 1, 1, false},
    {"time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer", 0, 1, 1, false},
    {"time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer", 0, 1, 1, false},
    {"transformer_blocks.#.norm1.linear", "double_blocks.#.img_mod.lin", 0, 1, 1, false},
    {"transformer_blocks.#.norm1_context.linear", "double_blocks.#.txt_mod.lin", 0, 1, 1, false},
    {"transformer_blocks.#.attn.to_q", "double_blocks.#.img_attn.qkv", 0, 1, 3, false},
    {"transformer_blocks.#.attn.to_k", "double_blocks.#.img_attn.qkv", 1, 1, 3, false},
    {"transformer_blocks.#.attn.to_v", "double_blocks.#.img_attn.qkv", 2, 1, 3, false},
    {"transformer_blocks.#.attn.add_q_proj", "double_blocks.#.txt_attn.qkv", 0, 1, 3, false},
    {"transformer_blocks.#.attn.add_k_proj", "double_blocks.#.txt_attn.qkv", 1, 1, 3, false},
    {"transformer_blocks.#.attn.add_v_proj", "double_blocks.#.txt_attn.qkv", 2, 1, 3, false},
    {"transformer_blocks.#.attn.norm_q.weight", "double_blocks.#.img_attn.norm.query_norm.scale", 0, 1, 1, false},
    {"transformer_blocks.#.attn.norm_k.weight", "double_blocks.#.img_attn.norm.key_norm.scale", 0, 1, 1, false},
    {"transformer_blocks.#.attn.norm_added_q.weight", "double_blocks.#.txt_attn.norm.query_norm.scale", 0, 1, 1, false},
    {"transformer_blocks.#.attn.norm_added_k.weight", "double_blocks.#.txt_attn.norm.key_norm.scale", 0, 1, 1, false},
    {"transformer_blocks.#.attn.to_out.0", "double_blocks.#.img_attn.proj", 0, 1, 1, false},
    {"transformer_blocks.#.attn.to_add_out", "double_blocks.#.txt_attn.proj", 0, 1, 1, false},
    {"transformer_blocks.#.ff.net.0.proj", "double_blocks.#.img_mlp.0", 0, 1, 1, false},
    {"transformer_blocks.#.ff.net.2", "double_blocks.#.img_mlp.2", 0, 1, 1, false},
    {"transformer_blocks.#.ff_context.net.0.proj", "double_blocks.#.txt_mlp.0", 0, 1, 1, false},
    {"transformer_blocks.#.ff_context.net.2", "double_blocks.#.txt_mlp.2", 0, 1, 1, false},
    {"single_transformer_blocks.#.norm.linear", "single_blocks.#.modulation.lin", 0, 1, 1, false},
    {"single_transformer_blocks.#.attn.to_q", "single_blocks.#.linear1", 0, 1, 7, false},
    {"single_transformer_blocks.#.attn.to_k", "single_blocks.#.linear1", 1, 1, 7, false},
    {"single_transformer_blocks.#.attn.to_v", "single_blocks.#.linear1", 2, 1, 7, false},
    {"single_transformer_blocks.#.proj_mlp", "single_blocks.#.linear1", 3, 4, 7, false},
    {"single_transformer_blocks.#.attn.norm_q.weight", "single_blocks.#.norm.query_norm.scale", 0, 1, 1, false},
    {"single_transformer_blocks.#.attn.norm_k.weight", "single_blocks.#.norm.key_norm.scale", 0, 1, 1, false},
    {"single_transformer_blocks.#.proj_out", "single_blocks.#.linear2", 0, 1, 1, false},
    {"norm_out.linear", "final_layer.adaLN_modulation.1", 0, 1, 1, true},
    {"proj_out", "final_layer.linear", 0, 1, 1, false},
};

// Whether name begins as the pattern says. *rest: what follows it; *number: where the digits of # begin, else "".
static bool match(const char *pattern, const char *name, const char **rest, const char **number)
{
    for (*number = ""; *pattern; pattern++) {
        const size_t digits = *pattern == '#' ? strspn(name, "0123456789") : 0;
        if (digits == 0 && *name != *pattern)
            return false;
        if (digits > 0)
            *number = name;
        name += digits ? digits : 1;
    }
    *rest = name;
    return true;
}

bool original_of(const char *diffusers, struct original *out)
{
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const char *rest, *number;
        if (!match(names[i].diffusers, diffusers, &rest, &number) ||
            (*rest && strcmp(rest, ".weight") != 0 && strcmp(rest, ".bias") != 0))
            continue;
        const char *from = names[i].original, *hash = strchr(from, '#');
        if (hash)
            snprintf(out->name, sizeof out->name, "%.*s%.*s%s%s", (int)(hash - from), from,
                     (int)strspn(number, "0123456789"), number, hash + 1, rest);
        else
            snprintf(out->name, sizeof out->name, "%s%s", from, rest);
        out->first = names[i].first;
        out->rows = names[i].rows;
        out->whole = names[i].whole;
        out->swapped = names[i].swapped;
        return true;
    }
    return false;
}

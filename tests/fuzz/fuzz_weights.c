// fuzz_weights.c: a safetensors file, or (when the input begins with {") the index of shards, one of which is there.
// What is taken has all its bytes, and is the same when it is written and opened again. The same file as a
// transformer's one, whose names are its authors' or diffusers'.
#include "tests/fuzz/fuzz.h"

#include "worker/weights.h"

#define ONE  "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}}"
#define STEM "model"

static const struct home nowhere;

static void prepare(void)
{
    static char shard[8 + sizeof ONE - 1 + 24] = {sizeof ONE - 1};
    if (fuzz_folder[0])
        return;
    fuzz_folder_make();
    memcpy(shard + 8, ONE, sizeof ONE - 1);
    fuzz_write("one.safetensors", shard, sizeof shard);
}

static void remove_file(const char *name)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", fuzz_folder, name);
    unlink(path);
}

static uint64_t header_length(const uint8_t *data)
{
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | data[i];
    return length;
}

static void use(struct weights *w)
{
    struct tensor t;
    struct weights *again;
    struct err err = {0};
    uint8_t print[32];
    weights_fingerprint(w, print);
    if (weights_has(w, "a"))
        fuzz_good(weights_get(w, &t, 2, 2, 3, 1, 1, &err, "a"), &err);
    if (!fuzz_good(weights_save(w, fuzz_folder, "saved", &err), &err))
        return;
    PROMISE(weights_open(fuzz_folder, "saved", &nowhere, &again, &err) == 0);
    PROMISE(weights_bytes(again) == weights_bytes(w));
    weights_free(again);
    remove_file("saved.safetensors");
}

unsigned char fuzz_sink; // what is stored here was read

static void use_as_transformer(const char *name)
{
    static const char *const names[] = {"x_embedder.weight", "transformer_blocks.0.attn.to_k.weight",
                                        "single_transformer_blocks.0.proj_mlp.bias", "norm_out.linear.weight"};
    char path[128];
    struct tensor t;
    struct weights *w;
    struct err err = {0};
    snprintf(path, sizeof path, "%s/%s", fuzz_folder, name);
    if (!fuzz_good(weights_open_file(path, &nowhere, &w, &err), &err))
        return;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        for (int64_t rows = 2; rows <= 4; rows += 2) {
            const int dims = strstr(names[i], "bias") ? 1 : 2;
            if (fuzz_good(weights_get(w, &t, dims, rows, dims == 1 ? 1 : 2, 1, 1, &err, "%s", names[i]), &err))
                for (size_t byte = 0; byte < tensor_bytes(t); byte++)
                    fuzz_sink ^= ((const unsigned char *)t.data)[byte];
        }
    fuzz_good(weights_refuse(w, "num_layers", &err, "transformer_blocks.%d.norm1.linear.weight", 1), &err);
    fuzz_good(weights_refuse_rest(w, &err), &err);
    weights_free(w);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const bool index = size > 1 && data[0] == '{' && data[1] == '"';
    const char *const name = index ? STEM ".safetensors.index.json" : STEM ".safetensors";
    struct weights *w;
    struct err err = {0};
    prepare();
    fuzz_write(name, data, size);
    if (fuzz_good(weights_open(fuzz_folder, STEM, &nowhere, &w, &err), &err)) {
        PROMISE(index || weights_bytes(w) == (int64_t)(size - 8 - header_length(data)));
        use(w);
    }
    weights_free(w);
    if (!index)
        use_as_transformer(name);
    remove_file(name);
    return 0;
}

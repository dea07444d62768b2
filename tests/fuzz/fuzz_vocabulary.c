// fuzz_vocabulary.c: a file of a tokenizer: the first byte chooses which, the rest is its bytes. The others are a small
// CLIP vocabulary's. What is taken tokenizes a text.
#include "tests/fuzz/fuzz.h"

#include "worker/text/clip_tokenizer.h"
#include "worker/text/t5_tokenizer.h"

#define VOCABULARY                                                                                                     \
    "{\"a\":0,\"b\":1,\"a</w>\":2,\"b</w>\":3,\"ab\":4,\"ab</w>\":5,\"<|startoftext|>\":6,\"<|endoftext|>\":7}"

static const struct {
    const char *name, *text; // NULL: not there
} files[] = {{"vocab.json", VOCABULARY},
             {"merges.txt", "#version: 0.2\na b</w>\n"},
             {"tokenizer_config.json", "{\"model_max_length\": 8}"},
             {"special_tokens_map.json", "{}"},
             {"spiece.model", NULL}};
enum { FILES = sizeof files / sizeof *files, TOKENS = 16 };

static void restore(int i)
{
    if (files[i].text)
        fuzz_write(files[i].name, files[i].text, strlen(files[i].text));
}

static void clip(void)
{
    struct clip_tokenizer *t;
    struct err err = {0};
    int32_t ids[TOKENS];
    int64_t count;
    if (!fuzz_good(clip_tokenizer_load(fuzz_folder, &t, &err), &err))
        return;
    PROMISE(clip_tokenizer_encode(t, "ab b <|name|> ab", 16, TOKENS, ids, &count, &err) == 0);
    for (int i = 0; i < TOKENS; i++)
        PROMISE(ids[i] >= 0 && ids[i] < clip_tokenizer_id_limit(t));
    clip_tokenizer_free(t);
}

static void t5(void)
{
    struct t5_tokenizer *t;
    struct err err = {0};
    int32_t ids[TOKENS];
    int64_t count;
    if (!fuzz_good(t5_tokenizer_load(fuzz_folder, &t, &err), &err))
        return;
    if (fuzz_good(t5_tokenizer_encode(t, "ab b </s> ab", 12, TOKENS, ids, &count, &err), &err))
        for (int i = 0; i < TOKENS; i++)
            PROMISE(ids[i] >= 0 && ids[i] < t5_tokenizer_id_limit(t));
    t5_tokenizer_free(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!fuzz_folder[0]) {
        fuzz_folder_make();
        for (int i = 0; i < FILES; i++)
            restore(i);
    }
    if (size < 1)
        return 0;
    const int i = data[0] % FILES;
    fuzz_write(files[i].name, data + 1, size - 1);
    if (files[i].text)
        clip();
    else
        t5();
    restore(i);
    return 0;
}

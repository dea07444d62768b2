// fuzz_prompt.c: a prompt through both tokenizers of the demo model. Ids are in the vocabulary, and every time the
// same.
#include "tests/fuzz/fuzz.h"

#include "worker/text/clip_tokenizer.h"
#include "worker/text/t5_tokenizer.h"

enum { CLIP_TOKENS = 77, T5_TOKENS = 64 };

static void check(const int32_t *one, const int32_t *two, int n, int32_t limit, int64_t count, int64_t least)
{
    PROMISE(count >= least && memcmp(one, two, (size_t)n * sizeof *one) == 0);
    for (int i = 0; i < n; i++)
        PROMISE(one[i] >= 0 && one[i] < limit);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct clip_tokenizer *clip;
    static struct t5_tokenizer *t5;
    const char *text = (const char *)data;
    struct err err = {0};
    int32_t ids[2][CLIP_TOKENS];
    int64_t count, again;
    if (!clip)
        PROMISE(clip_tokenizer_load("ops/demo/model/tokenizer", &clip, &err) == 0 &&
                t5_tokenizer_load("ops/demo/model/tokenizer_2", &t5, &err) == 0);
    if (fuzz_good(clip_tokenizer_encode(clip, text, size, CLIP_TOKENS, ids[0], &count, &err), &err)) {
        PROMISE(clip_tokenizer_encode(clip, text, size, CLIP_TOKENS, ids[1], &again, &err) == 0 && again == count);
        check(ids[0], ids[1], CLIP_TOKENS, clip_tokenizer_id_limit(clip), count, 2);
    }
    if (fuzz_good(t5_tokenizer_encode(t5, text, size, T5_TOKENS, ids[0], &count, &err), &err)) {
        PROMISE(t5_tokenizer_encode(t5, text, size, T5_TOKENS, ids[1], &again, &err) == 0 && again == count);
        check(ids[0], ids[1], T5_TOKENS, t5_tokenizer_id_limit(t5), count, 1);
    }
    return 0;
}

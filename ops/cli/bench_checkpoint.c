// bench_checkpoint.c: an architecture with its invented weights as files, so that loading can be measured from files of
// the real size.
#include <errno.h>
#include <jansson.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ops/cli/bench.h"
#include "ops/cli/json.h"
#include "proto/clock.h"

// What a model needs and an architecture has not.
static const char *const tokenizers[] = {"tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model"};

static bool is_there(const char *dir, const char *file)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", dir, file);
    return access(path, F_OK) == 0;
}

static void report_json(const struct bench *b, double seconds)
{
    json_t *missing = json_array();
    for (size_t i = 0; i < sizeof tokenizers / sizeof *tokenizers; i++)
        if (!is_there(b->checkpoint, tokenizers[i]))
            json_array_append_new(missing, json_string(tokenizers[i]));
    json_print(json_pack("{s:s,s:s,s:I,s:f,s:o}", "architecture", b->architecture, "directory", b->checkpoint, "bytes",
                         (json_int_t)b->memory.weights, "seconds", seconds, "missing", missing));
}

static void report(const struct bench *b, double seconds)
{
    const char *separator = "missing: ";
    printf("%s: %s, %lld bytes of weights in %.1f s\n", b->checkpoint, b->architecture, (long long)b->memory.weights,
           seconds);
    for (size_t i = 0; i < sizeof tokenizers / sizeof *tokenizers; i++)
        if (!is_there(b->checkpoint, tokenizers[i])) {
            printf("%s%s", separator, tokenizers[i]);
            separator = ", ";
        }
    if (separator[0] == ',')
        puts("; copy tokenizer/ and tokenizer_2/ there, from a FLUX.1 checkpoint or, to measure, from ops/demo/model");
}

// Every tensor is a window into the invention, and is written from there: a plan has no use for more.
static int save(struct bench *b, size_t largest, struct err *err)
{
    TRY(invention_new(largest, b->threads, &b->invention, err));
    const struct home home = {.invention = b->invention, .plan = true};
    TRY(model_load_on(b->checkpoint, &home, &b->model, err));
    b->memory.weights = model_bytes(b->model);
    return model_save(b->model, b->checkpoint, err);
}

int bench_checkpoint(struct bench *b, struct err *err)
{
    const double start = monotonic_seconds();
    const bool made = mkdir(b->checkpoint, 0777) == 0;
    size_t largest;
    if (!made && errno != EEXIST)
        return err_set(err, ERR_IO, "--write-checkpoint %.300s: cannot be made (%s)", b->checkpoint, strerror(errno));
    int rc = architecture_write(b->architecture, b->checkpoint, &largest, err);
    if (rc == 0) {
        rc = save(b, largest, err);
        if (rc != 0)
            architecture_remove(b->checkpoint);
    }
    if (rc == 0)
        (b->json ? report_json : report)(b, monotonic_seconds() - start);
    else if (made)
        rmdir(b->checkpoint);
    return rc;
}

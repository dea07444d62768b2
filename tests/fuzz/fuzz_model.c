// fuzz_model.c: a configuration file of a model: the first byte chooses which, the rest is its text; the others are the
// demo model's. Weights are invented and nothing computes.
#include "tests/fuzz/fuzz.h"

#include <sys/stat.h>

#include "worker/invent.h"
#include "worker/model.h"
#include "worker/weights.h"

static const char *const files[] = {
    "model_index.json",        "ditfleet.json",   "text_encoder/config.json",       "text_encoder_2/config.json",
    "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"};
enum { FILES = sizeof files / sizeof *files, ROOM = 8 << 20 };
static struct home home = {.k = &kernels_dry, .plan = true};

static void restore(const char *file)
{
    char from[128];
    snprintf(from, sizeof from, "ops/demo/model/%s", file);
    fuzz_copy(from, file);
}

static void prepare(void)
{
    static const char *const folders[] = {"text_encoder", "text_encoder_2", "transformer", "vae", "scheduler"};
    static struct invention *invention; // kept to the end
    const struct device_options options = {.threads = 1, .activation = DT_F32};
    struct err err = {0};
    char path[128];
    if (fuzz_folder[0])
        return;
    fuzz_folder_make();
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        snprintf(path, sizeof path, "%s/%s", fuzz_folder, folders[i]);
        PROMISE(mkdir(path, 0700) == 0);
    }
    for (int i = 0; i < FILES; i++)
        restore(files[i]);
    PROMISE(invention_new(ROOM, 1, &invention, &err) == 0);
    home.invention = invention;
    PROMISE(kernels_dry.open(&options, &home.d, &err) == 0);
}

static void use(const struct model *m)
{
    struct err err = {0};
    Ditfleet__V1__Job *job = job_new();
    PROMISE(job && job_set_field(job, "seed", "1", &err) == 0);
    PROMISE(model_resolve_job(m, job, &err) == 0); // what it leaves open the model's own bounds allow
    job_free(job);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct model *m;
    struct err err = {0};
    prepare();
    if (size < 1)
        return 0;
    const char *const file = files[data[0] % FILES];
    fuzz_write(file, data + 1, size - 1);
    if (fuzz_good(model_load_on(fuzz_folder, &home, &m, &err), &err)) {
        use(m);
        model_free(m);
    }
    restore(file);
    return 0;
}

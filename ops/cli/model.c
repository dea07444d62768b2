// ditfleet model: which models the fleet serves; whether a checkpoint is whole, in which formats, and what it takes.
#include <errno.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "ops/cli/connect.h"
#include "ops/cli/json.h"
#include "worker/engine.h"
#include "worker/weights.h"

// ---- list

static int list(struct connection *c, bool json)
{
    struct err err = {.code = ERR_NONE};
    struct queue *q = NULL;
    struct queue_model *models = NULL;
    size_t count = 0;
    json_t *array = json_array();
    int rc = connection_open(c, &q, &err);
    rc = rc ? rc : queue_models(q, &models, &count, &err);
    for (size_t i = 0; i < count; i++) {
        const struct queue_model *m = &models[i];
        json_array_append_new(array, json_pack("{s:s,s:s,s:b,s:I}", "name", m->name, "version", m->version, "default",
                                               (int)m->is_default, "published_ms", (json_int_t)m->published_ms));
        if (!json)
            printf("%s@%s%s\n", m->name, m->version, m->is_default ? " (default)" : "");
    }
    free(models);
    connection_close(c, q);
    if (json && rc == 0)
        json_print(array);
    else
        json_decref(array);
    return rc ? cli_fail(&err) : CLI_OK;
}

// ---- verify: the files

// Of one part: tensors by type, and what is wrong with their numbers.
struct tally {
    int64_t tensors[DT_COUNT];
    struct err *err; // the first tensor with a number that is none
};

// Bits of the exponent, all of which are set in infinities and NaNs (of E4M3, which has no infinity: in NaNs).
static bool all_finite(const struct tensor *t)
{
    const int64_t n = tensor_count(*t);
    bool good = true;
    for (int64_t i = 0; i < n && t->dtype == DT_F32; i++)
        good &= (((const uint32_t *)t->data)[i] & 0x7f800000) != 0x7f800000;
    for (int64_t i = 0; i < n && t->dtype == DT_F64; i++)
        good &= (((const uint64_t *)t->data)[i] & 0x7ff0000000000000) != 0x7ff0000000000000;
    for (int64_t i = 0; i < n && (t->dtype == DT_BF16 || t->dtype == DT_F16); i++) {
        const uint16_t exponent = t->dtype == DT_BF16 ? 0x7f80 : 0x7c00;
        good &= (((const uint16_t *)t->data)[i] & exponent) != exponent;
    }
    for (int64_t i = 0; i < n && t->dtype == DT_E4M3; i++)
        good &= (((const uint8_t *)t->data)[i] & 0x7f) != 0x7f;
    return good;
}

static void look_at(void *arg, const char *file, const char *name, struct tensor t)
{
    struct tally *tally = arg;
    tally->tensors[t.dtype]++;
    if (tally->err->code == ERR_NONE && !all_finite(&t))
        err_set(tally->err, ERR_CORRUPT, "%s: tensor %.120s holds infinities or NaNs: fetch the file again", file,
                name);
}

static int verify_part(const struct model *m, enum model_part p, json_t *parts, struct err *err)
{
    struct tally tally = {.err = err};
    weights_each(model_weights(m, p), look_at, &tally);
    TRY((int)err->code);
    json_t *formats = json_object();
    for (int t = 0; t < DT_COUNT; t++)
        if (tally.tensors[t])
            json_object_set_new(formats, dtype_name((enum dtype)t), json_integer(tally.tensors[t]));
    json_array_append_new(parts, json_pack("{s:s,s:I,s:o}", "part", model_part_name(p), "bytes",
                                           (json_int_t)model_part_bytes(m, p), "tensors", formats));
    return 0;
}

// ---- verify: checksums, of the files that DIR/SHA256SUMS names

enum { HEX = 64, LINE = 1200 };

static int sum_file(const char *path, char hex[HEX + 1], struct err *err)
{
    unsigned char bytes[1 << 16], digest[HEX / 2];
    FILE *f = fopen(path, "rbe");
    if (!f)
        return err_set(err, ERR_NOT_FOUND, "%s: cannot be opened (%s), but SHA256SUMS names it", path, strerror(errno));
    EVP_MD_CTX *md = EVP_MD_CTX_new();
    EVP_DigestInit_ex(md, EVP_sha256(), NULL);
    for (size_t n; (n = fread(bytes, 1, sizeof bytes, f)) > 0;)
        EVP_DigestUpdate(md, bytes, n);
    const bool read = !ferror(f);
    EVP_DigestFinal_ex(md, digest, NULL);
    EVP_MD_CTX_free(md);
    fclose(f);
    for (int i = 0; i < HEX / 2; i++)
        snprintf(hex + 2 * i, 3, "%02x", digest[i]);
    return read ? 0 : err_set(err, ERR_IO, "%s: cannot be read", path);
}

// A line of sha256sum: 64 digits, a space, a space or an asterisk, the name.
static int verify_sum(const char *dir, char *line, int number, struct err *err)
{
    char path[LINE + 1024], hex[HEX + 1];
    line[strcspn(line, "\n")] = '\0';
    if (strspn(line, "0123456789abcdef") != HEX ||
        (strncmp(line + HEX, "  ", 2) != 0 && strncmp(line + HEX, " *", 2) != 0))
        return err_set(err, ERR_CORRUPT, "%s/SHA256SUMS: line %d is not as sha256sum writes it", dir, number);
    snprintf(path, sizeof path, "%.1000s/%s", dir, line + HEX + 2);
    TRY(sum_file(path, hex, err));
    if (memcmp(hex, line, HEX) != 0)
        return err_set(err, ERR_CORRUPT, "%s: its SHA-256 is %s, not what SHA256SUMS says: fetch it again", path, hex);
    return 0;
}

// *count: of files; -1: there are no sums.
static int verify_sums(const char *dir, int *count, struct err *err)
{
    char path[1100], line[LINE];
    snprintf(path, sizeof path, "%.1000s/SHA256SUMS", dir);
    FILE *f = fopen(path, "re");
    *count = f ? 0 : -1;
    int rc = f || errno == ENOENT ? 0 : err_set(err, ERR_IO, "%s: %s", path, strerror(errno));
    while (f && rc == 0 && fgets(line, sizeof line, f))
        rc = verify_sum(dir, line, ++*count, err);
    if (f)
        fclose(f);
    return rc;
}

// ---- verify: memory, of one rank that makes the model's default picture

static void add_memory(json_t *list, const char *device, const char *precision, int64_t weights, size_t activations,
                       int64_t libraries)
{
    json_array_append_new(list, json_pack("{s:s,s:s,s:I,s:I,s:I}", "device", device, "precision", precision, "weights",
                                          (json_int_t)weights, "activations", (json_int_t)activations, "libraries",
                                          (json_int_t)libraries));
}

static const struct plan alone = {.ranks = 1, .cfg = 1, .ulysses = 1, .ring = 1, .pipe = 1, .patches = 1, .data = 1};

// On a GPU that computes so: the weights as they would be placed there, from shapes alone.
static int memory_on_gpu(const char *dir, const Ditfleet__V1__Job *job, const struct precision *p, json_t *list,
                         struct err *err)
{
    struct kernels k = kernels_dry;
    const struct device_options options = {.threads = 1, .activation = p->activation};
    struct home home = {.k = &k, .codes = p->codes, .plan = true};
    struct engine_estimate e = {0};
    struct model *m = NULL;
    k.activation = p->activation;
    TRY(k.open(&options, &home.d, err));
    int rc = model_load_on(dir, &home, &m, err);
    rc = rc ? rc : engine_predict_rank(m, job, &alone, 0, &k, &e, err);
    if (rc == 0)
        add_memory(list, "GPU", precision_name(p), model_placed_bytes(m, PARTS_ALL), e.activation_bytes,
                   ENGINE_LIBRARY_BYTES);
    model_free(m);
    k.close(home.d);
    return rc;
}

static int memory(const char *dir, const struct model *m, json_t *list, struct err *err)
{
    static const struct precision precisions[] = {
        {DT_F32, DT_F32}, {DT_BF16, DT_BF16}, {DT_F16, DT_F16}, {DT_BF16, DT_E4M3}, {DT_BF16, DT_I8}};
    Ditfleet__V1__Job *job = job_new();
    struct engine_estimate e = {0};
    int rc = job ? model_resolve_job(m, job, err) : err_set(err, ERR_NO_MEMORY, "out of memory");
    rc = rc ? rc : engine_predict_rank(m, job, &alone, 0, &kernels_cpu, &e, err);
    if (rc == 0) // the weights are mapped, once for all ranks
        add_memory(list, "CPU", "fp32", model_bytes(m), e.activation_bytes, 0);
    for (size_t i = 0; i < sizeof precisions / sizeof *precisions && rc == 0; i++)
        rc = memory_on_gpu(dir, job, &precisions[i], list, err);
    job_free(job);
    return rc;
}

// ---- verify

static void print_found(const json_t *found, int sums)
{
    size_t i;
    json_t *item, *n;
    const char *format;
    printf("hash     %s\n", json_string_value(json_object_get(found, "hash")));
    json_array_foreach(json_object_get(found, "parts"), i, item)
    {
        printf("part     %s: %.1f MB, tensors:", json_string_value(json_object_get(item, "part")),
               json_number_value(json_object_get(item, "bytes")) / 1e6);
        json_object_foreach(json_object_get(item, "tensors"), format, n)
            printf(" %" JSON_INTEGER_FORMAT " %s", json_integer_value(n), format);
        putchar('\n');
    }
    json_array_foreach(json_object_get(found, "memory"), i, item) printf(
        "memory   %s on a %s: %.1f MB of weights, %.1f of activations, %.1f of libraries\n",
        json_string_value(json_object_get(item, "precision")), json_string_value(json_object_get(item, "device")),
        json_number_value(json_object_get(item, "weights")) / 1e6,
        json_number_value(json_object_get(item, "activations")) / 1e6,
        json_number_value(json_object_get(item, "libraries")) / 1e6);
    if (sums < 0)
        printf("sums     there is no SHA256SUMS to compare with\n");
    else
        printf("sums     %d files as SHA256SUMS says\n", sums);
}

static int verify(const char *dir, bool json)
{
    struct err err = {.code = ERR_NONE};
    struct model *m = NULL;
    json_t *parts = json_array(), *memories = json_array();
    int sums = -1, rc = model_load(dir, &m, &err);
    for (enum model_part p = 0; p < PARTS && rc == 0; p++)
        rc = verify_part(m, p, parts, &err);
    rc = rc ? rc : verify_sums(dir, &sums, &err);
    rc = rc ? rc : memory(dir, m, memories, &err);
    json_t *found = json_pack("{s:s,s:s,s:o,s:o,s:i}", "directory", dir, "hash", m ? m->hash : "", "parts", parts,
                              "memory", memories, "sums", sums);
    if (rc == 0 && !json)
        print_found(found, sums);
    if (rc == 0 && json)
        json_print(found);
    else
        json_decref(found);
    model_free(m);
    if (rc == 0)
        return CLI_OK;
    cli_fail(&err);
    return CLI_FAILED; // whatever the code: the directory was judged
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct connection c = {0};
    bool json = false;
    const struct cli_flag flags[] = {CONNECTION_FLAGS(c), {"--json", NULL, "print JSON", CLI_BOOL, &json, 0, 0}};
    const char **operands = calloc((size_t)argc, sizeof *operands);
    int n = 0;
    int code =
        operands ? cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, operands, &n) : CLI_FAILED;
    if (code < 0) {
        const bool lists = n > 0 && strcmp(operands[0], "list") == 0,
                   judges = n > 0 && strcmp(operands[0], "verify") == 0;
        code = cli_operands(self, lists || judges ? n : 0, lists ? 1 : 2);
        if (code < 0)
            code = lists ? list(&c, json) : verify(operands[1], json);
    }
    free(operands);
    return code;
}

const struct cli_command cli_model = {"model", "list | verify DIR",
                                      "the models that are served; whether a checkpoint is whole, and what it takes",
                                      run, false};

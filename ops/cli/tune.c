// ditfleet tune: measures what worker/cost.h asks of this machine, with all ranks at it, and keeps it for the planner.
//
// A sample is some operations of a transformer's block; the dry backend counts what they are. Each is run at several
// sizes, in batches that are long beside a time slice of the scheduler: where ranks are more than cores, shorter ones
// would see a core of their own. The middle batch counts, then the middle size, then the middle rank. GPUs exchange as
// in a picture: with each other's memory open where that can be.
#include <stdlib.h>
#include <string.h>

#include "kernels/backend.h"
#include "ops/cli/cli.h"
#include "ops/cli/json.h"
#include "ops/cli/ranks.h"
#include "proto/clock.h"
#include "proto/conf.h"
#include "worker/invent.h"
#include "worker/tuned.h"

enum { MAX_SIZES = 8, MAX_BLOCKS = 16, BATCHES = 5, WEIGHTS = 4, SAMPLES = 4, WORD = 16 };
enum { OUT, IN, FETCHED, MAILS };
static const double CPU_BATCH_SECONDS = 0.012, GPU_BATCH_SECONDS = 0.08; // a GPU is slower once it is at its power cap

// What was found at each size, lowest and highest.
struct found {
    double middle, low, high;
    int sizes;
};

// What all parameters come to on a rank. Floats of one struct, so that ranks can exchange it.
struct findings {
    struct found products, attention, rows, copies, operation, exchange, collective, beside;
};

struct tuning {
    const char *device;
    int ranks, threads;
    bool json;
    Ditfleet__V1__Job *job; // its precision alone
    const struct kernels *kernels;
    struct precision precision;
    struct tuned_key key;
    struct findings found; // on rank 0
};

// Tensors of a block of a given width, for some rows at most.
struct bed {
    struct kernels k; // saying the activation type
    struct device *d, *dry;
    struct comm *control, *link; // link: of GPUs; NULL
    struct comm *comm;           // by which tensors are exchanged: one of the two
    void *mail[MAILS];           // what is said, heard and fetched: mail_bytes each
    int64_t mail_bytes;
    const void *theirs[COMM_MAX_RANKS]; // what each rank says, where that rank has it
    struct invention *invention;
    void *blocks[MAX_BLOCKS];
    int n_blocks;
    int64_t rows, width, head_dim, shards; // shards: bytes of each rank's
    struct linear w[WEIGHTS];              // qkv, out, up, down
    struct tensor x, a, y;                 // (rows, width)
    struct tensor qkv, up;                 // (rows, 3 * width), (rows, 4 * width)
    struct tensor gate;                    // (width)
    struct tensor norm, rope;              // (head_dim), (rows, head_dim / 2, 2) f32
};

typedef void (*sample)(const struct bed *b, const struct kernels *k, struct device *d, int64_t rows);

// ---- samples

static void products_before_attention(const struct bed *b, const struct kernels *k, struct device *d, int64_t rows)
{
    k->linear(d, tensor_rows(b->qkv, 0, rows), tensor_rows(b->x, 0, rows), &b->w[0], ACT_NONE);
}

static void products_after_attention(const struct bed *b, const struct kernels *k, struct device *d, int64_t rows)
{
    struct tensor x = tensor_rows(b->x, 0, rows), y = tensor_rows(b->y, 0, rows), up = tensor_rows(b->up, 0, rows);
    k->linear(d, y, x, &b->w[1], ACT_NONE);
    k->linear(d, up, x, &b->w[2], ACT_GELU_TANH);
    k->linear(d, y, up, &b->w[3], ACT_NONE);
}

static void products(const struct bed *b, const struct kernels *k, struct device *d, int64_t rows)
{
    products_before_attention(b, k, d, rows);
    products_after_attention(b, k, d, rows);
}

static struct tensor heads(const struct bed *b, struct tensor t, int64_t rows, int part)
{
    const struct tensor columns = tensor_cols(tensor_rows(t, 0, rows), part * b->width, b->width);
    return tensor_reshape(columns, 3, rows, b->width / b->head_dim, b->head_dim, 1);
}

static void attention(const struct bed *b, const struct kernels *k, struct device *d, int64_t rows)
{
    const struct attention_opts opts = {.scale = 1.0F / (float)b->head_dim, .eight_bits = b->w[0].w[0].dtype == DT_I8};
    k->attention(d, heads(b, b->y, rows, 0), heads(b, b->qkv, rows, 0), heads(b, b->qkv, rows, 1),
                 heads(b, b->qkv, rows, 2), &opts);
}

static void row_wise(const struct bed *b, const struct kernels *k, struct device *d, int64_t rows)
{
    const struct tensor y = tensor_rows(b->y, 0, rows);
    k->gate_add_modulate(d, tensor_rows(b->x, 0, rows), b->gate, tensor_rows(b->a, 0, rows), y, b->gate, b->gate,
                         1e-6F);
    k->qk_norm_rope(d, heads(b, b->qkv, rows, 0), heads(b, b->qkv, rows, 1), b->norm, b->norm, 1e-6F,
                    tensor_rows(b->rope, 0, rows));
}

// One with gaps, as heads are taken out and put back, and one without.
static void copies(const struct bed *b, const struct kernels *k, struct device *d, int64_t rows)
{
    const struct tensor y = tensor_rows(b->y, 0, rows);
    k->copy(d, tensor_cols(tensor_rows(b->up, 0, rows), 0, b->width), y);
    k->copy(d, y, tensor_rows(b->a, 0, rows));
}

// So many bytes to every rank.
static void say(const struct bed *b, int64_t bytes)
{
    int64_t counts[COMM_MAX_RANKS], offsets[COMM_MAX_RANKS];
    for (int r = 0; r < comm_size(b->comm); r++) {
        counts[r] = bytes;
        offsets[r] = r * bytes;
    }
    comm_all_to_all(b->comm, b->mail[OUT], counts, offsets, b->mail[IN], counts, offsets);
}

// What a layer is to a group: work, then a word to everybody. Ranks that come from work do not come at the same moment.
static void products_and_word(const struct bed *b, const struct kernels *k, struct device *d, int64_t rows)
{
    products(b, k, d, rows);
    say(b, WORD);
}

// ---- the bed

static int make(struct bed *b, enum dtype type, int64_t rows, int64_t columns, float scale, struct tensor *out,
                struct err *err)
{
    struct tensor t = tensor_2d(NULL, type, rows, columns);
    uint32_t state = 1;
    float *host = malloc((size_t)(rows * columns) * sizeof *host);
    if (!host)
        return err_set(err, ERR_NO_MEMORY, "no memory to measure with");
    for (int64_t i = 0; i < rows * columns; i++) {
        state = state * 1664525U + 1013904223U;
        host[i] = scale * ((float)(state >> 8) / (float)(1 << 23) - 1);
    }
    int rc = b->k.alloc(b->d, tensor_bytes(t), &t.data, err);
    if (rc == 0) {
        b->blocks[b->n_blocks++] = t.data;
        b->k.upload(b->d, t, host);
        rc = b->k.sync(b->d, err);
    }
    free(host);
    *out = t;
    return rc;
}

static int make_weights(struct bed *b, enum dtype codes, struct err *err)
{
    const int64_t w = b->width, shapes[WEIGHTS][2] = {{3 * w, w}, {w, w}, {4 * w, w}, {w, 4 * w}};
    for (int i = 0; i < WEIGHTS; i++) {
        struct tensor t;
        TRY(invention_tensor(b->invention, "a weight", 2, shapes[i], &t, err));
        TRY(linear_init(&b->w[i], 1, &t, NULL, err));
        TRY(b->k.place_linear(b->d, &b->w[i], codes, false, err));
    }
    return 0;
}

static int make_bed(struct bed *b, int64_t rows, int64_t width, int64_t head_dim, enum dtype codes, struct err *err)
{
    const enum dtype type = b->k.activation;
    b->rows = rows;
    b->width = width;
    b->head_dim = head_dim;
    TRY(invention_new((size_t)(4 * width * width) * sizeof(uint16_t), 1, &b->invention, err));
    TRY(make_weights(b, codes, err));
    TRY(make(b, type, rows, width, 1, &b->x, err));
    TRY(make(b, type, rows, width, 1, &b->a, err));
    TRY(make(b, type, rows, width, 1, &b->y, err));
    TRY(make(b, type, rows, 3 * width, 1, &b->qkv, err));
    TRY(make(b, type, rows, 4 * width, 1, &b->up, err));
    TRY(make(b, type, 1, width, 1e-6F, &b->gate, err)); // x stays what it is, however often it is added to
    TRY(make(b, type, 1, head_dim, 1, &b->norm, err));
    TRY(make(b, DT_F32, rows, head_dim, 1, &b->rope, err));
    b->gate = tensor_reshape(b->gate, 1, width, 1, 1, 1);
    b->norm = tensor_reshape(b->norm, 1, head_dim, 1, 1, 1);
    b->rope = tensor_reshape(b->rope, 3, rows, head_dim / 2, 2, 1);
    return 0;
}

static void clear_bed(struct bed *b)
{
    b->k.sync(b->d, &(struct err){0});
    for (int i = 0; i < WEIGHTS; i++)
        for (int j = 0; j < b->w[i].parts; j++)
            b->k.displace(b->d, b->w[i].w[j]);
    memset(b->w, 0, sizeof b->w);
    while (b->n_blocks > 0)
        b->k.free(b->d, b->blocks[--b->n_blocks]);
    invention_free(b->invention);
    b->invention = NULL;
}

// ---- measuring

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static struct found found_of(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, ascending);
    return (struct found){n % 2 ? values[n / 2] : (values[n / 2] + values[n / 2 - 1]) / 2, values[0], values[n - 1], n};
}

static int count(struct bed *b, sample s, int64_t rows, struct kernel_cost *out, struct err *err)
{
    struct kernels dry = kernels_dry;
    struct kernel_cost before, after;
    dry.cost(b->dry, &before);
    s(b, &dry, b->dry, rows);
    TRY(dry.sync(b->dry, err));
    dry.cost(b->dry, &after);
    *out = (struct kernel_cost){0};
    kernel_cost_add(out, &after, &before);
    return 0;
}

static int time_batch(struct bed *b, sample s, int64_t rows, int runs, double *out, struct err *err)
{
    const double from = monotonic_seconds();
    for (int i = 0; i < runs; i++)
        s(b, &b->k, b->d, rows);
    TRY(b->k.sync(b->d, err));
    *out = (monotonic_seconds() - from) / runs;
    return 0;
}

// Seconds of one run, while the other ranks do the same.
static int time_sample(struct bed *b, sample s, int64_t rows, double *out, struct err *err)
{
    double batches[BATCHES], once;
    TRY(time_batch(b, s, rows, 2, &once, err));
    TRY(time_batch(b, s, rows, 1, &once, err));
    const double batch = b->k.link ? GPU_BATCH_SECONDS : CPU_BATCH_SECONDS;
    const int runs = once < batch ? (int)(batch / once) + 1 : 1;
    comm_barrier(b->comm);
    for (int i = 0; i < BATCHES; i++)
        TRY(time_batch(b, s, rows, runs, &batches[i], err));
    *out = found_of(batches, BATCHES).middle;
    return comm_check(b->comm, err);
}

// What a size gives, in a list of such.
struct sizes {
    double values[MAX_SIZES];
    int n;
};

// Adds amount / seconds at a size: a rate. operation: seconds of each, which are not its work.
static int add_rate(struct bed *b, sample s, int64_t rows, double operation, struct sizes *to, struct err *err)
{
    struct kernel_cost cost;
    double seconds;
    TRY(count(b, s, rows, &cost, err));
    TRY(time_sample(b, s, rows, &seconds, err));
    const double work = seconds - cost.calls * operation,
                 amount = cost.flops + cost.row_bytes + cost.copied; // of one kind alone
    to->values[to->n++] = amount / (work > seconds / 10 ? work : seconds / 10);
    return 0;
}

// Widths and rows that are measured: of small models and of large ones, of thin slices and of thick.
struct size {
    int64_t width, head_dim, rows[3]; // 0: none
};
static const struct size cpu_sizes[] = {{256, 32, {64, 256, 1024}}, {1024, 128, {64, 256, 0}}};
static const struct size gpu_sizes[] = {{1536, 64, {1024, 4096, 0}}, {3072, 128, {1024, 2304, 4608}}};

// With and without in turns: what else the machine does is in both.
static int time_collective(struct bed *b, int64_t rows, struct findings *f, struct err *err)
{
    enum { RUNS = 20 }; // the same on all ranks
    double more[2 * BATCHES], alone, with;
    for (int i = 0; i < 2 * BATCHES; i++) {
        TRY(time_batch(b, products, rows, RUNS, &alone, err));
        TRY(time_batch(b, products_and_word, rows, RUNS, &with, err));
        more[i] = with > alone ? with - alone : 0;
    }
    f->collective = found_of(more, 2 * BATCHES);
    f->collective.sizes = 1;
    return 0;
}

static int measure_collective(struct bed *b, int64_t rows, struct findings *f, struct err *err)
{
    TRY(comm_open_memory(b->comm, true, err));
    TRY(time_collective(b, rows, f, err));
    return comm_close_memory(b->comm, err);
}

static int measure_bed(struct bed *b, const struct size *size, struct findings *f, struct sizes lists[SAMPLES],
                       struct err *err)
{
    if (f->operation.sizes == 0 && comm_size(b->comm) > 1)
        TRY(measure_collective(b, size->rows[0], f, err));
    if (f->operation.sizes == 0) { // of the smallest there are: one row
        struct kernel_cost cost;
        double seconds;
        TRY(count(b, row_wise, 1, &cost, err));
        TRY(time_sample(b, row_wise, 1, &seconds, err));
        seconds /= cost.calls;
        f->operation = found_of(&seconds, 1);
    }
    static const sample samples[SAMPLES] = {products, attention, row_wise, copies};
    for (int i = 0; i < 3 && size->rows[i] > 0; i++)
        for (int s = 0; s < SAMPLES; s++)
            TRY(add_rate(b, samples[s], size->rows[i], f->operation.middle, &lists[s], err));
    return 0;
}

static int measure_compute(struct bed *b, bool cpu, enum dtype codes, struct findings *f, struct err *err)
{
    struct sizes lists[SAMPLES] = {0};
    for (int i = 0; i < 2; i++) {
        const struct size *size = cpu ? &cpu_sizes[i] : &gpu_sizes[i];
        int64_t most = 0;
        for (int j = 0; j < 3; j++)
            most = size->rows[j] > most ? size->rows[j] : most;
        int rc = make_bed(b, most, size->width, size->head_dim, codes, err);
        if (rc == 0)
            rc = measure_bed(b, size, f, lists, err);
        clear_bed(b);
        TRY(rc);
    }
    f->products = found_of(lists[0].values, lists[0].n);
    f->attention = found_of(lists[1].values, lists[1].n);
    f->rows = found_of(lists[2].values, lists[2].n);
    f->copies = found_of(lists[3].values, lists[3].n);
    return 0;
}

// Seconds of an all-to-all of so many bytes to every rank.
static int time_exchange(struct bed *b, int64_t bytes, double *out, struct err *err)
{
    double batches[BATCHES];
    const int runs = bytes > 1 << 18 ? 8 : 200; // the same on all ranks
    for (int i = -1; i < BATCHES; i++) {
        const double from = monotonic_seconds();
        for (int j = 0; j < runs; j++)
            say(b, bytes);
        TRY(b->k.sync(b->d, err));
        if (i >= 0)
            batches[i] = (monotonic_seconds() - from) / runs;
    }
    *out = found_of(batches, BATCHES).middle;
    return comm_check(b->comm, err);
}

enum { EXCHANGES = 4 };
static const int64_t cpu_exchanges[EXCHANGES] = {32 << 10, 128 << 10, 512 << 10, 2 << 20}; // to all others together
static const int64_t gpu_exchanges[EXCHANGES] = {1 << 20, 8 << 20, 32 << 20, 128 << 20};

static int time_exchanges(struct bed *b, struct findings *f, struct err *err)
{
    const int others = comm_size(b->comm) - 1;
    double rates[EXCHANGES], collective; // at the least, whatever noise made of it
    TRY(time_exchange(b, WORD, &collective, err));
    for (int i = 0; i < EXCHANGES; i++) {
        const int64_t each = (b->link ? gpu_exchanges : cpu_exchanges)[i] / others;
        double seconds;
        TRY(time_exchange(b, each, &seconds, err));
        const double moving = seconds - collective;
        rates[i] = (double)each * others / (moving > seconds / 10 ? moving : seconds / 10);
    }
    if (f->collective.middle < collective)
        f->collective = found_of(&collective, 1);
    f->exchange = found_of(rates, EXCHANGES);
    return 0;
}

static int measure_exchange(struct bed *b, struct findings *f, struct err *err)
{
    TRY(comm_open_memory(b->comm, true, err));
    TRY(time_exchanges(b, f, err));
    return comm_close_memory(b->comm, err);
}

// ---- shards that are fetched beside

// Of a layer of a group under Ulysses: queries, keys and values go to those who have their heads, and come back as one.
static void layer(const struct bed *b, const struct kernels *k, struct device *d, int64_t rows)
{
    const int64_t piece = rows * b->width * (int64_t)dtype_size(b->k.activation) / comm_size(b->comm);
    products_before_attention(b, k, d, rows);
    say(b, 3 * piece);
    attention(b, k, d, rows);
    say(b, piece);
    products_after_attention(b, k, d, rows);
}

// The next one's shards come meanwhile.
static void layer_and_shards(const struct bed *b, const struct kernels *k, struct device *d, int64_t rows)
{
    struct comm_lot lots[COMM_MAX_RANKS];
    for (int r = 0; r < comm_size(b->comm); r++)
        lots[r] = (struct comm_lot){b->theirs[r], (char *)b->mail[FETCHED] + r * b->shards, b->shards};
    comm_fetch(b->comm, lots, b->shards * (comm_size(b->comm) - 1), false);
    layer(b, k, d, rows);
    comm_fetched(b->comm, false);
}

// All ranks fetch as much: what alone would take about half as long as the layer, as of FLUX.1 on two GPUs with NVLink.
static int choose_shards(struct bed *b, double layer_seconds, double rate, struct err *err)
{
    const int ranks = comm_size(b->control);
    int64_t mine = (int64_t)(layer_seconds / 2 * rate) / (ranks - 1);
    mine = (mine < b->mail_bytes / ranks ? mine : b->mail_bytes / ranks) / 4096 * 4096;
    comm_broadcast(b->control, &mine, sizeof mine, 0);
    b->shards = mine > 0 ? mine : 4096;
    return comm_check(b->control, err);
}

// With and without in turns.
static int time_beside(struct bed *b, int64_t rows, struct findings *f, struct err *err)
{
    enum { RUNS = 60 };
    double costs[BATCHES], alone, with;
    TRY(time_batch(b, layer, rows, RUNS, &alone, err));
    TRY(choose_shards(b, alone, f->exchange.middle, err));
    const double shards = (double)b->shards * (comm_size(b->comm) - 1) / f->exchange.middle;
    for (int i = -1; i < BATCHES; i++) {
        TRY(time_batch(b, layer, rows, RUNS, &alone, err));
        TRY(time_batch(b, layer_and_shards, rows, RUNS, &with, err));
        const double cost = (with - alone) / shards;
        if (i >= 0)
            costs[i] = cost < 0 ? 0 : cost < 1 ? cost : 1;
    }
    f->beside = found_of(costs, BATCHES);
    return comm_check(b->comm, err);
}

static int tell_addresses(struct bed *b, struct err *err)
{
    int64_t counts[COMM_MAX_RANKS];
    const void *mine = b->mail[OUT];
    for (int r = 0; r < comm_size(b->control); r++)
        counts[r] = sizeof mine;
    comm_all_gather(b->control, &mine, b->theirs, counts);
    return comm_check(b->control, err);
}

// GPUs that cannot reach each other's memory wait for shards as for anything.
static int measure_beside(struct bed *b, enum dtype codes, struct findings *f, struct err *err)
{
    const struct size *size = &gpu_sizes[1];
    double all = 1;
    int rc = make_bed(b, size->rows[1], size->width, size->head_dim, codes, err);
    if (rc == 0)
        rc = comm_open_memory(b->comm, true, err);
    if (rc == 0)
        rc = tell_addresses(b, err);
    if (rc == 0 && !comm_memory_is_open(b->comm))
        f->beside = found_of(&all, 1);
    else if (rc == 0)
        rc = time_beside(b, size->rows[1], f, err);
    if (rc == 0)
        rc = comm_close_memory(b->comm, err);
    clear_bed(b);
    return rc;
}

// *f becomes the middle of all ranks'.
static int middle_rank(struct comm *c, struct findings *f, struct err *err)
{
    enum { FOUND = sizeof *f / sizeof(struct found) };
    struct findings all[COMM_MAX_RANKS];
    int64_t counts[COMM_MAX_RANKS];
    for (int r = 0; r < comm_size(c); r++)
        counts[r] = sizeof *f;
    comm_all_gather(c, f, all, counts);
    TRY(comm_check(c, err));
    for (int i = 0; i < FOUND; i++) {
        double middles[COMM_MAX_RANKS];
        for (int r = 0; r < comm_size(c); r++)
            middles[r] = ((const struct found *)&all[r])[i].middle;
        ((struct found *)f)[i].middle = found_of(middles, comm_size(c)).middle;
    }
    return 0;
}

static int open_bed(struct bed *b, const struct tuning *t, struct err *err)
{
    enum { LINK_TIMEOUT_MS = 60000 };
    const struct device_options options = {
        .threads = t->threads, .gpu = comm_rank(b->control), .activation = t->precision.activation};
    const int64_t largest = b->k.link ? gpu_exchanges[EXCHANGES - 1] : cpu_exchanges[EXCHANGES - 1];
    TRY(b->k.open(&options, &b->d, err));
    TRY(kernels_dry.open(&options, &b->dry, err));
    if (comm_size(b->control) == 1)
        return 0;
    if (b->k.link)
        TRY(comm_link_new(b->control, &b->k, b->d, LINK_TIMEOUT_MS, &b->link, err));
    b->comm = b->link ? b->link : b->control;
    b->mail_bytes = 2 * largest; // to the others and to oneself
    for (int i = 0; i < MAILS; i++) {
        TRY(b->k.alloc(b->d, (size_t)b->mail_bytes, &b->mail[i], err));
        b->k.zero(b->d, tensor_1d(b->mail[i], DT_U8, b->mail_bytes));
    }
    return 0;
}

static void close_bed(struct bed *b)
{
    comm_free(b->link);
    for (int i = 0; i < MAILS && b->mail[i]; i++)
        b->k.free(b->d, b->mail[i]);
    if (b->dry)
        kernels_dry.close(b->dry);
    if (b->d)
        b->k.close(b->d);
}

static int measure(void *arg, struct comm *comm, struct err *err)
{
    struct tuning *t = arg;
    const bool cpu = t->kernels == &kernels_cpu;
    struct bed b = {.k = *t->kernels, .control = comm, .comm = comm};
    b.k.activation = t->precision.activation;
    int rc = open_bed(&b, t, err);
    if (rc == 0)
        rc = measure_compute(&b, cpu, t->precision.codes, &t->found, err);
    if (rc == 0 && comm_size(comm) > 1)
        rc = measure_exchange(&b, &t->found, err);
    if (rc == 0 && b.link)
        rc = measure_beside(&b, t->precision.codes, &t->found, err);
    if (rc == 0)
        rc = middle_rank(comm, &t->found, err);
    if (rc != 0)
        comm_abort(comm, err->text); // nobody may wait for this rank
    close_bed(&b);
    return rc;
}

// ---- what comes of it

// A single rank exchanges nothing.
static struct machine machine_of(const struct tuning *t)
{
    struct machine c = machine_default(&t->key);
    c.products = t->found.products.middle;
    c.attention = t->found.attention.middle;
    c.rows = t->found.rows.middle;
    c.copies = t->found.copies.middle;
    c.operation = t->found.operation.middle;
    if (t->found.exchange.sizes > 0) {
        c.exchange = t->found.exchange.middle;
        c.collective = t->found.collective.middle;
    }
    if (t->found.beside.sizes > 0)
        c.beside = t->found.beside.middle;
    return c;
}

static void print_found(const char *name, const struct found *f, double unit, const char *unit_name)
{
    printf("%-11s %9.2f %s", name, f->middle / unit, unit_name);
    if (f->sizes > 1)
        printf(" (%d sizes: %.2f to %.2f)", f->sizes, f->low / unit, f->high / unit);
    putchar('\n');
}

static void print_all(const struct tuning *t)
{
    const struct findings *f = &t->found;
    printf("%s in %s, %d ranks", t->key.device, t->key.precision, t->ranks);
    printf(t->key.threads ? " of %d threads\n" : "\n", t->key.threads);
    print_found("products", &f->products, 1e9, "GFLOP/s");
    print_found("attention", &f->attention, 1e9, "GFLOP/s");
    print_found("rows", &f->rows, 1e9, "GB/s");
    print_found("copies", &f->copies, 1e9, "GB/s");
    print_found("operation", &f->operation, 1e-6, "us");
    if (f->exchange.sizes > 0) {
        print_found("exchange", &f->exchange, 1e9, "GB/s");
        print_found("collective", &f->collective, 1e-6, "us");
    }
    if (f->beside.sizes > 0)
        print_found("shards", &f->beside, 0.01, "% of their time, fetched beside");
}

static json_t *found_json(const struct found *f)
{
    return json_pack("{s:f, s:f, s:f, s:i}", "median", f->middle, "min", f->low, "max", f->high, "sizes", f->sizes);
}

static void print_json(const struct tuning *t, const char *path)
{
    const struct findings *f = &t->found;
    json_t *object = json_pack("{s:s, s:s, s:i, s:i, s:s, s:o, s:o, s:o, s:o, s:o}", "device", t->key.device,
                               "precision", t->key.precision, "ranks", t->ranks, "threads", t->key.threads, "file",
                               path, "products_flop_per_s", found_json(&f->products), "attention_flop_per_s",
                               found_json(&f->attention), "rows_byte_per_s", found_json(&f->rows), "copies_byte_per_s",
                               found_json(&f->copies), "operation_s", found_json(&f->operation));
    if (f->exchange.sizes > 0)
        json_object_update_new(object, json_pack("{s:o, s:o}", "exchange_byte_per_s", found_json(&f->exchange),
                                                 "collective_s", found_json(&f->collective)));
    if (f->beside.sizes > 0)
        json_object_set_new(object, "beside", found_json(&f->beside));
    json_print(object);
}

static int tune(struct tuning *t, struct err *err)
{
    const struct conf_group one = {.local_ranks = 1};
    const int cores = conf_group_threads(&one);
    char path[4096];
    if (strcmp(t->device, "dry") == 0)
        return err_set(err, ERR_INVALID, "--device dry: it may be cpu or cuda");
    const bool cuda = strcmp(t->device, "cuda") == 0;
    if (t->ranks == 0)
        t->ranks = cuda ? 1 : cores < 2 ? 2 : cores < COMM_MAX_RANKS ? cores : COMM_MAX_RANKS;
    const struct conf_group group = {.local_ranks = t->ranks, .threads = t->threads};
    t->threads = conf_group_threads(&group);
    TRY(backend_find(t->device, &t->kernels, err));
    TRY(precision_of(t->kernels, t->job->precision, t->job->precision, &t->precision, err));
    tuned_key_of(t->kernels, t->ranks, t->threads, &t->precision, &t->key);
    TRY(ranks_run(t->ranks, measure, t, err));
    const struct machine c = machine_of(t);
    const int rc = tuned_save(NULL, &t->key, &c, path, sizeof path, err);
    if (!t->json)
        print_all(t);
    else if (rc == 0)
        print_json(t, path);
    if (rc == 0 && !t->json)
        printf("written to %s\n", path);
    return rc;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct tuning t = {.device = "cpu", .job = job_new()};
    const char *precision = NULL;
    const struct cli_flag flags[] = {
        {"--device", "cpu|cuda", "what the ranks are; cuda: a GPU each (default cpu)", CLI_STRING, &t.device, 0, 0},
        {"--ranks", "N", "processes that share the machine; default: cores, two at least; of GPUs 1", CLI_INT, &t.ranks,
         1, COMM_MAX_RANKS},
        {"--threads", "N", "threads of each rank; default: cores / ranks", CLI_INT, &t.threads, 1, 1024},
        {"--precision", "NAME", "of a GPU: fp32, bf16, fp16, fp8 or int8 (default bf16)", CLI_STRING, &precision, 0, 0},
        {"--json", NULL, "one JSON object instead of lines", CLI_BOOL, &t.json, 0, 0},
    };
    struct err err = {.code = ERR_NONE};
    int rc = t.job ? cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, NULL, NULL) : CLI_FAILED;
    if (rc < 0 && precision && job_set_field(t.job, "precision", precision, &err) != 0)
        rc = cli_fail(&err);
    if (rc < 0)
        rc = tune(&t, &err) == 0 ? CLI_OK : cli_fail(&err);
    job_free(t.job);
    return rc;
}

const struct cli_command cli_tune = {"tune", "", "measure what plans cost on this machine, for the planner", run, true};

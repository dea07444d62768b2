// The configuration table: what a file may say, and that every refusal names file, line, key and what is allowed.
#include "proto/conf.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "proto/job.h"

static struct conf *parse(const char *text)
{
    struct conf *c = NULL;
    struct err err = {0};
    if (conf_parse(text, "f.ini", &c, &err) != 0)
        fail_msg("refused: %s", err.text);
    return c;
}

static void defaults_fill_an_empty_file(void **state)
{
    (void)state;
    struct conf *c = parse("");
    assert_string_equal(c->redis.url, "redis://127.0.0.1:6379");
    assert_string_equal(c->redis.queue, "default");
    assert_true(strlen(c->fleet.node) > 0);
    assert_true(c->queue.lease_s == 30);
    assert_true(c->restart.backoff_max_s == 60);
    assert_int_equal(c->log.level, LOG_INFO);
    assert_string_equal(c->metrics.listen, ""); // nobody listens unless told to
    assert_int_equal(c->n_groups, 0);
    conf_free(c);
}

static void every_kind_of_value_is_read(void **state)
{
    (void)state;
    struct conf *c = parse(
        "\xef\xbb\xbf; a comment\n[redis]\nurl = unix:///run/r.sock\n[fleet]\nnode=n1\n"
        "[upload]\nallow = 127.0.0.1:80, [::1]:8080\nallow = host:1\n"
        "file_roots = /a\n  /b\nretries = 0\n[deadline]\ntext = 250ms\ndecode = 1.5h\n"
        "[log]\nlevel = debug\n[metrics]\nlisten = [::]:9464\n"
        "[group g1]\nranks = 6\nring_degree = 3\nweights = sharded\nthreads = 3\nslab = 1M\nmodel = "
        "flux@1=/m/flux\nmodel = b@2.1=rel/b\n"
        "[group g2]\npipefusion_degree = 4\npipefusion_blocks = 1,2, 30,4\nnum_pipeline_patch = 8\nwarmup_steps = "
        "2\ndata_degree = 3\nmodel = "
        "flux@1=/m");
    assert_string_equal(c->redis.url, "unix:///run/r.sock");
    assert_int_equal(c->upload.allow.count, 3);
    assert_string_equal(c->upload.allow.items[1], "[::1]:8080");
    assert_string_equal(c->upload.allow.items[2], "host:1");
    assert_null(c->upload.allow.items[3]);
    assert_int_equal(c->upload.file_roots.count, 2);
    assert_string_equal(c->upload.file_roots.items[1], "/b");
    assert_int_equal(c->upload.retries, 0);
    assert_true(c->deadline.text_s == 0.25);
    assert_true(c->deadline.decode_s == 5400);
    assert_int_equal(c->log.level, LOG_DEBUG);
    assert_string_equal(c->metrics.listen, "[::]:9464");
    assert_int_equal(c->n_groups, 2);
    const struct conf_group *g = conf_group_find(c, "g1");
    assert_non_null(g);
    assert_int_equal(g->ranks, 6);
    assert_int_equal(g->ring_degree, 3);
    assert_int_equal(g->ulysses_degree, 0);
    assert_int_equal(g->pipefusion_degree, 1);
    assert_int_equal(g->num_pipeline_patch, 0);
    assert_int_equal(g->warmup_steps, 1);
    assert_int_equal(conf_group_threads(g), 3);
    assert_int_equal(g->slab_bytes, 1 << 20);
    assert_int_equal(g->model.count, 2);
    assert_string_equal(g->models[1].name, "b");
    assert_string_equal(g->models[1].version, "2.1");
    assert_string_equal(g->models[1].directory, "rel/b");
    const struct conf_group *g2 = conf_group_find(c, "g2");
    assert_true(conf_group_threads(g2) >= 1);
    assert_int_equal(g2->pipefusion_degree, 4);
    assert_string_equal(g2->pipefusion_blocks, "1,2, 30,4");
    assert_string_equal(g->pipefusion_blocks, "");
    assert_int_equal(g2->num_pipeline_patch, 8);
    assert_int_equal(g2->warmup_steps, 2);
    assert_int_equal(g2->data_degree, 3);
    assert_int_equal(g->weights, 1);
    assert_int_equal(g2->weights, 0);
    assert_int_equal(g->data_degree, 0);
    assert_null(conf_group_find(c, "g3"));
    char id[CONF_WORKER_ID_BYTES];
    assert_string_equal(conf_worker_id(c, "g1", id), "n1.g1");
    conf_free(c);
}

static void wrong_files_are_refused_by_file_line_key_and_rule(void **state)
{
    (void)state;
    static const struct {
        const char *text, *want[4];
    } cases[] = {
        {"[redis]\nurl = http://x", {"f.ini:2", "[redis] url", "redis://"}},
        {"[redis]\nurl = redis://", {"f.ini:2", "unix:///path"}},
        {"[redis]\nurle = x", {"f.ini:2", "[redis] urle", "allowed: url queue"}},
        {"[queue]\n\n\nlease = 0.5", {"f.ini:4", "[queue] lease", "1s to 3600s"}},
        {"[queue]\nlease = inf", {"lease", "30s"}},
        {"[queue]\nlease = 0x10", {"lease", "30s"}},
        {"[queue]\nlease = 10 minutes", {"lease", "500ms"}},
        {"[queue]\nmax_attempts = 2.5", {"max_attempts", "whole number from 0 to 100"}},
        {"[queue]\nmax_attempts = 99999999999999999999", {"max_attempts"}},
        {"[log]\nlevel = loud", {"f.ini:2", "one of debug info warn error"}},
        {"[nosuch]\n", {"f.ini:1", "[nosuch]", "[group NAME]"}},
        {"[group]\nranks=1", {"f.ini:1", "needs a name"}},
        {"[group a.b]\nranks=1", {"needs a name"}},
        {"[group a]\nranks = 65\nmodel=a@1=/m", {"[group a] ranks", "\"65\"", "1 to 64"}},
        {"[group a]\nranks = 2\nweights = split\nmodel=a@1=/m", {"[group a] weights", "replicated sharded"}},
        {"[group a]\nweights = sharded\nmodel=a@1=/m", {"[group a] weights", "ranks of 2 or more"}},
        {"[group a]\nranks = 2\npipefusion_degree = 2\nweights = sharded\nmodel=a@1=/m",
         {"[group a] weights", "PipeFusion"}},
        {"[group a]\npipefusion_blocks = 1;2\nmodel=a@1=/m", {"[group a] pipefusion_blocks", "\"1;2\"", "2,4"}},
        {"[group a]\npipefusion_blocks = 1,\nmodel=a@1=/m", {"[group a] pipefusion_blocks", "\"1,\"", "2,4"}},
        {"[group a]\npipefusion_blocks = 0,6\nmodel=a@1=/m", {"[group a] pipefusion_blocks", "\"0,6\"", "2,4"}},
        {"[group a]\npipefusion_blocks = 1,70000\nmodel=a@1=/m", {"[group a] pipefusion_blocks", "from 1 to 1000"}},
        {"[group a]\npipefusion_blocks = 1,,2\nmodel=a@1=/m", {"[group a] pipefusion_blocks", "\"1,,2\"", "2,4"}},
        {"[group a]\nwarmup_steps = 0\nmodel=a@1=/m", {"[group a] warmup_steps", "\"0\"", "1 to 1000"}},
        {"[group a]\nring_degree = 65\nmodel=a@1=/m", {"[group a] ring_degree", "\"65\"", "0 to 64"}},
        {"[group a]\nranks = 2", {"[group a] model", "is missing"}},
        {"[group a]", {"[group a] model", "is missing"}},
        {"[group a]\nmodel = flux=/x", {"f.ini:2", "name@version=directory"}},
        {"[group a]\nmodel = f@1=/x\nmodel = f@1=/y", {"[group a] model", "twice"}},
        {"[group a]\nmodel = f@1=/x\nranks = 1\nranks = 2", {"f.ini:4", "[group a] ranks", "first in line 3"}},
        {"[group a]\nslab = 3\nmodel = f@1=/x", {"slab", "64K"}},
        {"[group a]\nmemory_budget = 24GB\nmodel = f@1=/x", {"memory_budget", "1GiB"}},
        {"[group a]\nmemory_budget = 24GiB\nmodel = f@1=/x", {"[group a] memory_budget", "device is cpu"}},
        {"[group a]\ndevice = gpu\nmodel = f@1=/x", {"f.ini:2", "[group a] device", "one of cpu cuda"}},
        {"[group a]\ngpu = 1\nmodel = f@1=/x", {"[group a] gpu", "device is cpu"}},
        {"[group a]\nexact = yes\nmodel = f@1=/x", {"[group a] exact", "device is cpu"}},
        {"[group a]\nprecision = bf16\nmodel = f@1=/x", {"[group a] precision", "computes in fp32"}},
        {"[group a]\nprecision = int4\nmodel = f@1=/x", {"precision", "one of default fp32 bf16 fp16 fp8 int8"}},
        {"[group a]\ndevice = cuda\nranks = 2\nmodel = f@1=/x", {"[group a] ranks", "is 2", "gpu names 1"}},
        {"[group a]\ndevice = cuda\ngpu = 64\nmodel = f@1=/x", {"[group a] gpu", "0 to 63"}},
        {"[group a]\ndevice = cuda\ngpu = 0,1,0\nmodel = f@1=/x", {"[group a] gpu", "each GPU once"}},
        {"[group a]\ndevice = cuda\ngpu = 0,1\nranks = 3\nmodel = f@1=/x", {"[group a] ranks", "gpu names 2"}},
        {"[group a]\ndevice = cuda\ngpu = 1\nmodel = f@1=/x\n[group b]\nmodel = f@1=/x\ngpu=2,1\ndevice=cuda",
         {"[group b] gpu", "[group a]'s already"}},
        {"[fleet]\naddress = gpu1", {"[fleet] address", "IPv4 or IPv6"}},
        {"[group a]\nnodes = a:1\nmodel = f@1=/x", {"[group a] nodes", "two or more NODE:RANKS"}},
        {"[group a]\nnodes = a:1, b\nmodel = f@1=/x", {"[group a] nodes", "\"a:1, b\""}},
        {"[group a]\nnodes = a:1, b:0\nmodel = f@1=/x", {"[group a] nodes", "NODE:RANKS"}},
        {"[group a]\nnodes = a:1, b:64\nmodel = f@1=/x", {"[group a] nodes", "64 ranks in all"}},
        {"[group a]\nnodes = a:1, b:1,\nmodel = f@1=/x", {"[group a] nodes", "NODE:RANKS"}},
        {"[fleet]\nnode=c\naddress=::1\n[group a]\nnodes = a:1, b:1\nmodel = f@1=/x",
         {"[group a] nodes", "does not name this node, which is c"}},
        {"[fleet]\nnode=a\naddress=::1\n[group a]\nnodes = a:1, a:1\nmodel = f@1=/x", {"[group a] nodes", "twice"}},
        {"[fleet]\nnode=a\n[group a]\nnodes = a:1, b:1\nmodel = f@1=/x", {"[fleet] address", "is needed"}},
        {"[fleet]\nnode=a\naddress=::1\n[group a]\nnodes = a:1, b:1\nranks = 3\nmodel = f@1=/x",
         {"[group a] ranks", "is 3, and nodes has 2"}},
        {"[fleet]\nnode=a\naddress=::1\n[group a]\nnodes = a:2, b:1\ndevice=cuda\nmodel = f@1=/x",
         {"[group a] gpu", "names 1 for the 2 ranks of this node"}},
        {"[upload]\nallow = 10.0.0.1", {"allow", "host:port"}},
        {"[upload]\nallow = h:70000", {"allow", "65535"}},
        {"[upload]\nallow = ::1:80", {"allow", "[address]:port"}},
        {"[upload]\nfile_roots = relative", {"file_roots", "absolute"}},
        {"[metrics]\nlisten = 9464", {"f.ini:2", "[metrics] listen", "127.0.0.1:9464"}},
        {"[metrics]\nlisten = localhost:9464", {"[metrics] listen", "address:port"}},
        {"[metrics]\nlisten = ::1:9464", {"[metrics] listen", "address:port"}},
        {"[metrics]\nlisten = [::1:9464", {"[metrics] listen", "address:port"}},
        {"[metrics]\nlisten = []:9464", {"[metrics] listen", "address:port"}},
        {"[metrics]\nlisten = ]:1", {"[metrics] listen", "address:port"}},
        {"[metrics]\nlisten = :9464", {"[metrics] listen", "address:port"}},
        {"[metrics]\nlisten = 127.0.0.1:65536", {"[metrics] listen", "address:port"}},
        {"[metrics]\nlisten = 127.0.0.1:80x", {"[metrics] listen", "address:port"}},
        {"[fleet]\nnode = a b", {"node", "letters"}},
        {"[fleet]\nstate_dir =", {"state_dir", "bytes"}},
        {"[restart]\nbackoff_min = 10s\nbackoff_max = 1s", {"backoff_max", "below backoff_min"}},
        {"[callback]\nbackoff_min = 10s\nbackoff_max = 1s", {"[callback] backoff_max", "below backoff_min"}},
        {"[callback]\nsecret_file = secrets", {"[callback] secret_file", "an absolute path, or nothing"}},
        {"[callback]\nallow = example.org", {"[callback] allow", "host:port"}},
        {"ranks = 2", {"f.ini:1", "no section"}},
        {"[redis]\nwhat is this", {"f.ini:2", "neither"}},
        {"[redis\nurl = x", {"f.ini:1"}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct conf *c = NULL;
        struct err err = {0};
        if (conf_parse(cases[i].text, "f.ini", &c, &err) != ERR_INVALID)
            fail_msg("accepted: %s", cases[i].text);
        for (int w = 0; w < 4 && cases[i].want[w]; w++)
            if (!strstr(err.text, cases[i].want[w]))
                fail_msg("%s: \"%s\" lacks \"%s\"", cases[i].text, err.text, cases[i].want[w]);
    }
}

static void secrets_stay_out_of_errors(void **state)
{
    (void)state;
    struct conf *c = NULL;
    struct err err = {0};
    assert_int_equal(conf_parse("[redis]\nurl = http://user:hunter2@h\n", "f.ini", &c, &err), ERR_INVALID);
    assert_null(strstr(err.text, "hunter2"));
}

static void a_line_that_inih_would_cut_is_refused(void **state)
{
    (void)state;
    char text[700] = "[fleet]\nnode = ";
    memset(text + strlen(text), 'x', 600);
    struct conf *c = NULL;
    struct err err = {0};
    assert_int_equal(conf_parse(text, "f.ini", &c, &err), ERR_INVALID);
    assert_non_null(strstr(err.text, "f.ini:2: the line is longer"));
}

// Every byte string is legal input: each prefix and each one-byte damage of a good file gives a struct or an error.
static void damaged_files_never_crash(void **state)
{
    (void)state;
    const char *good = "[upload]\nallow = a:1, b:2\n c:3\n[group g]\nmodel = f@1=/x\nslab = 1M\n";
    char text[128];
    for (size_t i = 0; i < strlen(good); i++)
        for (int b = 0; b < 256; b++) {
            struct conf *c = NULL;
            struct err err = {0};
            snprintf(text, sizeof text, "%s", good);
            text[i] = (char)b;
            if (conf_parse(text, "f.ini", &c, &err) == 0)
                conf_free(c);
            else
                assert_true(strlen(err.text) > 0);
        }
}

static void sizes_have_units(void **state)
{
    (void)state;
    static const char *const wrong[] = {"", "GiB", "-1", "1T", "1 GiB", "1.0001K", "1e3", "nan", "1025GiB"};
    int64_t bytes = 0;
    assert_true(conf_size("24GiB", &bytes) && bytes == 24LL << 30);
    assert_true(conf_size("1.5G", &bytes) && bytes == 3LL << 29);
    assert_true(conf_size("512M", &bytes) && bytes == 512LL << 20);
    assert_true(conf_size("0", &bytes) && bytes == 0);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        assert_false(conf_size(wrong[i], &bytes));
}

// The documentation is a file: as printed, and with every default taken in, it gives the defaults.
static void the_documentation_is_an_example_file(void **state)
{
    (void)state;
    char *doc = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&doc, &n);
    conf_print_doc(f);
    fclose(f);
    assert_non_null(doc);
    conf_free(parse(doc));
    for (char *line = doc; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL)
        if (line[0] == '#' && line[1] != ' ')
            line[0] = '\n';
    struct conf *c = NULL;
    struct err err = {0};
    assert_int_equal(conf_parse(doc, "doc", &c, &err), ERR_INVALID); // all is good but the one key without a default
    if (!strstr(err.text, "[group NAME] model"))
        fail_msg("%s", err.text);
    free(doc);
}

static void fingerprints_tell_what_workers_read(void **state)
{
    (void)state;
    static const char *const same = "[group g]\nmodel = f@1=/x\n[redis]\nqueue = other\n[restart]\ngrace = 1s\n"
                                    "[callback]\nattempts = 2\n";
    static const char *const other[] = {"[group g]\nmodel = f@1=/y\n", "[group g]\nmodel = f@1=/x\nranks = 2\n",
                                        "[group g]\nmodel = f@1=/x\n[deadline]\ntext = 7s\n",
                                        "[group g]\nmodel = f@1=/x\n[callback]\nsecret_file = /s\n"};
    struct conf *a = parse("[group g]\nmodel = f@1=/x\n"), *b = parse(same);
    char *x = conf_group_fingerprint(a, &a->groups[0]), *y = conf_group_fingerprint(b, &b->groups[0]);
    assert_string_equal(x, y);
    free(y);
    conf_free(b);
    for (size_t i = 0; i < sizeof other / sizeof *other; i++) {
        b = parse(other[i]);
        y = conf_group_fingerprint(b, &b->groups[0]);
        assert_string_not_equal(x, y);
        free(y);
        conf_free(b);
    }
    free(x);
    conf_free(a);
}

static void a_relative_model_lies_beside_the_file(void **state)
{
    (void)state;
    struct conf *c = NULL;
    struct err err = {0};
    assert_int_equal(conf_parse("[group g]\nmodel = f@1=m/f\nmodel = g@1=/g\n", "/etc/d/f.ini", &c, &err), 0);
    assert_string_equal(c->groups[0].models[0].directory, "/etc/d/m/f");
    assert_string_equal(c->groups[0].models[1].directory, "/g");
    conf_free(c);
}

static void gpu_groups_name_their_gpu(void **state)
{
    (void)state;
    struct conf *c = parse("[group a]\ndevice = cuda\nmodel = f@1=/x\nmemory_budget = 24GiB\nprecision = fp8\n"
                           "[group b]\ndevice = cuda\ngpu = 1, 3\nexact = yes\nmodel = f@1=/x\n"
                           "[group c]\nmodel = f@1=/x\nranks = 2\nprecision = fp32\n");
    assert_int_equal(c->groups[0].device, CONF_DEVICE_CUDA);
    assert_int_equal(c->groups[0].gpus[0], 0);
    assert_int_equal(c->groups[0].ranks, 1);
    assert_int_equal(c->groups[0].precision, DITFLEET__V1__PRECISION__PRECISION_FP8);
    assert_int_equal(c->groups[1].n_gpus, 2);
    assert_int_equal(c->groups[1].exact, 1);
    assert_int_equal(c->groups[0].exact, 0);
    assert_int_equal(c->groups[1].gpus[1], 3);
    assert_int_equal(c->groups[1].ranks, 2);
    assert_int_equal(c->groups[1].precision, DITFLEET__V1__PRECISION__PRECISION_DEFAULT);
    assert_int_equal(c->groups[2].device, CONF_DEVICE_CPU);
    conf_free(c);
}

static void a_group_may_span_nodes(void **state)
{
    (void)state;
    struct conf *c = NULL;
    struct err err = {0};
    char worker[CONF_WORKER_ID_BYTES];
    assert_int_equal(conf_parse("[fleet]\nnode = gpu-2\naddress = fd00::2\n[group wide]\ndevice = cuda\ngpu = 4,5\n"
                                "nodes = gpu-1:4,gpu-2:2, gpu-3:2\nmodel = f@1=/x\n[group own]\nranks = 3\n"
                                "model = f@1=/x\n",
                                "f.ini", &c, &err),
                     0);
    const struct conf_group *g = conf_group_find(c, "wide"), *own = conf_group_find(c, "own");
    assert_int_equal(g->n_nodes, 3);
    assert_int_equal(g->my_node, 1);
    assert_string_equal(g->spans[2].name, "gpu-3");
    assert_int_equal(g->ranks, 8);
    assert_int_equal(g->first_rank, 4);
    assert_int_equal(g->local_ranks, 2);
    assert_string_equal(conf_worker_id(c, "wide", worker), "gpu-1.wide"); // whose rank 0 claims
    assert_int_equal(own->n_nodes, 0);
    assert_int_equal(own->first_rank, 0);
    assert_int_equal(own->local_ranks, 3);
    assert_string_equal(conf_worker_id(c, "own", worker), "gpu-2.own");
    // What is each node's own does not have to agree.
    char *terms = conf_group_terms(g);
    assert_non_null(strstr(terms, "group.nodes=gpu-1:4,gpu-2:2, gpu-3:2\n"));
    assert_non_null(strstr(terms, "group.model=f@1\n"));
    assert_null(strstr(terms, "/x"));
    assert_null(strstr(terms, "gpu="));
    free(terms);
    conf_free(c);
}

static void a_missing_file_is_named(void **state)
{
    (void)state;
    struct conf *c = NULL;
    struct err err = {0};
    assert_int_equal(conf_load("/nonexistent/f.ini", &c, &err), ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, "/nonexistent/f.ini"));
    assert_int_not_equal(conf_load("/", &c, &err), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults_fill_an_empty_file),
        cmocka_unit_test(every_kind_of_value_is_read),
        cmocka_unit_test(wrong_files_are_refused_by_file_line_key_and_rule),
        cmocka_unit_test(secrets_stay_out_of_errors),
        cmocka_unit_test(a_line_that_inih_would_cut_is_refused),
        cmocka_unit_test(damaged_files_never_crash),
        cmocka_unit_test(sizes_have_units),
        cmocka_unit_test(the_documentation_is_an_example_file),
        cmocka_unit_test(fingerprints_tell_what_workers_read),
        cmocka_unit_test(a_relative_model_lies_beside_the_file),
        cmocka_unit_test(gpu_groups_name_their_gpu),
        cmocka_unit_test(a_group_may_span_nodes),
        cmocka_unit_test(a_missing_file_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

// What was measured of a machine, on disk: read as it was written, by its own key alone, and whatever else lies there
// counts as nothing.
#include "worker/tuned.h"

#include <dirent.h>
#include <math.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/unit/place.h"

static const struct machine machine = {.products = 1.2345678912e11,
                                       .attention = 6e10,
                                       .rows = 1e10,
                                       .copies = 2e10,
                                       .operation = 1.5e-6,
                                       .exchange = 5e9,
                                       .collective = 2e-5,
                                       .beside = 0.25};
static const struct tuned_key key = {.device = "Processor \"9000\"", .ranks = 4, .threads = 2, .precision = "fp32"};

static void save(struct place *p, const struct machine *c)
{
    struct err err;
    if (tuned_save(p->folder, &key, c, p->file, sizeof p->file, &err) != 0)
        fail_msg("%s", err.text);
}

static int files_in(const char *folder)
{
    int n = 0;
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d));)
        n += e->d_name[0] != '.';
    if (d)
        closedir(d);
    return n;
}

static void expect_found(const struct place *p, const struct machine *expected)
{
    struct machine c;
    const double *a = (const double *)&c, *b = (const double *)expected;
    assert_true(tuned_load(p->folder, &key, &c));
    for (size_t i = 0; i < sizeof c / sizeof *a; i++)
        assert_true(fabs(a[i] - b[i]) <= 1e-8 * b[i]);
}

static void written_and_read(void **state)
{
    struct place *p = *state;
    struct machine c, other = machine;
    struct stat st;
    assert_false(tuned_load(p->folder, &key, &c));
    save(p, &machine);
    expect_found(p, &machine);
    assert_int_equal(stat(p->folder, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
    other.rows = 3e9;
    save(p, &other); // in its place
    expect_found(p, &other);
    assert_int_equal(files_in(p->folder), 1);
}

static void of_another_key(void **state)
{
    struct place *p = *state;
    struct tuned_key keys[4] = {key, key, key, key};
    struct machine c;
    char path[512];
    struct err err;
    save(p, &machine);
    keys[0].ranks = 2;
    keys[1].threads = 1;
    strcpy(keys[2].device, "Processor 9000");
    strcpy(keys[3].precision, "bf16");
    for (int i = 0; i < 4; i++) {
        assert_false(tuned_load(p->folder, &keys[i], &c));
        assert_int_equal(tuned_save(p->folder, &keys[i], &machine, path, sizeof path, &err), 0);
        assert_string_not_equal(path, p->file);
        assert_int_equal(rename(path, p->file), 0); // theirs under our name
        assert_false(tuned_load(p->folder, &key, &c));
        save(p, &machine);
    }
}

// GPUs measured together count for so many; one that was measured alone, for any number.
static void gpus(void **state)
{
    struct place *p = *state;
    struct tuned_key one = {.device = "GPU", .ranks = 1, .precision = "bf16"}, two = one, of_cpu = one;
    struct machine c, together = machine;
    struct err err;
    two.ranks = 2;
    of_cpu.threads = 1;
    together.exchange = 2e9;
    assert_int_equal(tuned_save(p->folder, &one, &machine, NULL, 0, &err), 0);
    assert_true(tuned_load(p->folder, &two, &c) && c.exchange == machine.exchange);
    assert_int_equal(tuned_save(p->folder, &two, &together, NULL, 0, &err), 0);
    assert_true(tuned_load(p->folder, &two, &c) && c.exchange == together.exchange);
    assert_true(tuned_load(p->folder, &one, &c) && c.exchange == machine.exchange);
    assert_int_equal(tuned_save(p->folder, &of_cpu, &machine, NULL, 0, &err), 0);
    of_cpu.ranks = 2;
    assert_false(tuned_load(p->folder, &of_cpu, &c));
}

static char *contents(const char *path, size_t *n)
{
    char *text = calloc(1, 1 << 16);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    *n = fread(text, 1, (1 << 16) - 1, f);
    fclose(f);
    return text;
}

static void rewrite(const char *path, const char *text, size_t n)
{
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, n, f), n);
    fclose(f);
}

// Cut at each length, each byte changed: nothing, or numbers that a machine may have.
static void damaged(void **state)
{
    struct place *p = *state;
    struct machine c;
    size_t n;
    int lost = 0;
    save(p, &machine);
    char *text = contents(p->file, &n);
    for (size_t i = 0; i < 2 * n; i++) {
        char *copy = calloc(1, n + 1);
        memcpy(copy, text, n);
        if (i >= n)
            copy[i - n] ^= 1;
        rewrite(p->file, copy, i < n ? i : n);
        free(copy);
        if (!tuned_load(p->folder, &key, &c)) {
            lost++;
            continue;
        }
        assert_true(i >= n); // a whole file
        for (size_t j = 0; j < sizeof c / sizeof(double); j++)
            assert_true(isfinite(((const double *)&c)[j]) && ((const double *)&c)[j] >= 0);
        assert_true(c.products >= 1e6 && c.attention >= 1e6 && c.rows >= 1e6 && c.exchange >= 1e3);
    }
    assert_true(lost > (int)n);
    free(text);
    save(p, &machine); // what is measured next mends it
    expect_found(p, &machine);
}

// Each parameter in turn is text, missing, or a number that no machine has.
static void no_such_machine(void **state)
{
    static const char *const values[] = {"\"1e9\"", "-1", "0.0000001e-300", "1e30", "null", "[]", "true"};
    struct place *p = *state;
    struct machine c;
    size_t n;
    save(p, &machine);
    char *text = contents(p->file, &n);
    const char *at = strstr(text, "\"products_flop_per_s\": ");
    assert_non_null(at);
    at += strlen("\"products_flop_per_s\": ");
    const char *after = at + strcspn(at, ",\n}");
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        char other[4096];
        const int length = snprintf(other, sizeof other, "%.*s%s%s", (int)(at - text), text, values[i], after);
        rewrite(p->file, other, (size_t)length);
        assert_false(tuned_load(p->folder, &key, &c));
    }
    free(text);
}

static void in_the_way(void **state)
{
    struct place *p = *state;
    struct machine c;
    struct err err;
    save(p, &machine);
    assert_int_equal(unlink(p->file), 0);
    assert_int_equal(mkfifo(p->file, 0600), 0); // nobody writes into it: reading it must not wait
    assert_false(tuned_load(p->folder, &key, &c));
    save(p, &machine);
    expect_found(p, &machine);
    assert_int_equal(unlink(p->file), 0);
    assert_int_equal(mkdir(p->file, 0700), 0);
    assert_false(tuned_load(p->folder, &key, &c));
    assert_int_equal(tuned_save(p->folder, &key, &machine, NULL, 0, &err), ERR_IO);
    assert_int_equal(files_in(p->folder), 1); // no temporary file beside it
    assert_int_equal(tuned_save("/dev/null/x", &key, &machine, NULL, 0, &err), ERR_IO);
    assert_false(tuned_load("/dev/null/x", &key, &c));
    unsetenv("XDG_CACHE_HOME");
    unsetenv("HOME");
    assert_int_equal(tuned_save(NULL, &key, &machine, NULL, 0, &err), ERR_IO);
    assert_false(tuned_load(NULL, &key, &c));
}

static void full_disk(void **state)
{
    struct place *p = *state;
    save(p, &machine);
    const pid_t child = fork();
    if (child == 0) { // no file may grow beyond a few bytes: as on a disk without room
        struct err err;
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){40, 40});
        _exit(tuned_save(p->folder, &key, &(struct machine){.rows = 1}, NULL, 0, &err) == ERR_IO ? 0 : 1);
    }
    int status = 1;
    assert_true(waitpid(child, &status, 0) == child);
    assert_int_equal(status, 0);
    expect_found(p, &machine); // what was there
    assert_int_equal(files_in(p->folder), 1);
}

static void keys_and_defaults(void **state)
{
    const struct precision fp32 = {.activation = DT_F32}, fp8 = {.activation = DT_BF16, .codes = DT_E4M3},
                           int8 = {.activation = DT_BF16, .codes = DT_I8};
    struct kernels gpu = kernels_dry;
    struct tuned_key k;
    (void)state;
    tuned_key_of(&kernels_cpu, 3, 2, &fp32, &k);
    assert_true(k.device[0] && k.ranks == 3 && k.threads == 2);
    assert_string_equal(k.precision, "fp32");
    const struct machine cpu = machine_default(&k);
    tuned_key_of(&gpu, 3, 2, &fp8, &k);
    assert_true(k.device[0] && k.ranks == 3 && k.threads == 0);
    assert_string_equal(k.precision, "fp8");
    const struct machine h100 = machine_default(&k);
    tuned_key_of(&gpu, 3, 2, &int8, &k);
    assert_string_equal(k.precision, "int8");
    assert_true(machine_default(&k).products == h100.products);
    assert_true(cpu.products > 0 && cpu.collective > 0 && h100.products > 100 * cpu.products);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(written_and_read, place_set_up, place_tear_down),
        cmocka_unit_test_setup_teardown(of_another_key, place_set_up, place_tear_down),
        cmocka_unit_test_setup_teardown(gpus, place_set_up, place_tear_down),
        cmocka_unit_test_setup_teardown(damaged, place_set_up, place_tear_down),
        cmocka_unit_test_setup_teardown(no_such_machine, place_set_up, place_tear_down),
        cmocka_unit_test_setup_teardown(in_the_way, place_set_up, place_tear_down),
        cmocka_unit_test_setup_teardown(full_disk, place_set_up, place_tear_down),
        cmocka_unit_test(keys_and_defaults),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

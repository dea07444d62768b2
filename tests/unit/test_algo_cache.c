// The algorithm cache: what was put is found again by another process's eyes, and nothing that can lie in the file, or
// stand in the way of writing it, is an error.
#include "kernels/algo_cache.h"

#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/unit/place.h"

enum { KEY = 5 };
static const char *const WORDS = "GPU Test 9000, driver 1, library 2";

// The one file in the folder; "" when there is none, and the test fails when there are more.
static const char *only_file(struct place *p)
{
    p->file[0] = 0;
    DIR *d = opendir(p->folder);
    for (struct dirent *e; d && (e = readdir(d));)
        if (e->d_name[0] != '.') {
            assert_int_equal(p->file[0], 0);
            snprintf(p->file, sizeof p->file, "%s/%s", p->folder, e->d_name);
        }
    if (d)
        closedir(d);
    return p->file;
}

static void key_of(int64_t i, int64_t key[KEY])
{
    const int64_t k[KEY] = {i, -i, INT64_MAX, INT64_MIN, 1 << 20};
    memcpy(key, k, sizeof k);
}

static void put(struct algo_cache *c, int64_t i, uint64_t what)
{
    int64_t key[KEY];
    const uint64_t algo[ALGO_WORDS] = {what, 0, UINT64_MAX, 0xdeadbeefu, what << 40, 5, 6, 7};
    key_of(i, key);
    algo_cache_put(c, key, algo);
}

static bool has(const struct algo_cache *c, int64_t i, uint64_t what)
{
    int64_t key[KEY];
    uint64_t algo[ALGO_WORDS];
    key_of(i, key);
    return algo_cache_find(c, key, algo) && algo[0] == what && algo[2] == UINT64_MAX && algo[4] == what << 40 &&
           algo[7] == 7;
}

static void write_some(struct place *p, int64_t from, int64_t to)
{
    struct algo_cache *c = algo_cache_open(p->folder, "cublaslt", WORDS, KEY);
    for (int64_t i = from; i < to; i++)
        put(c, i, (uint64_t)i + 100);
    algo_cache_close(c);
}

static void found_again(void **state)
{
    struct place *p = *state;
    struct stat st;
    struct algo_cache *c = algo_cache_open(p->folder, "cublaslt", WORDS, KEY);
    assert_false(has(c, 1, 101));
    algo_cache_save(c); // nothing new: nothing written
    assert_string_equal(only_file(p), "");
    put(c, 1, 5);
    put(c, 1, 101);
    put(c, 2, 102);
    assert_true(has(c, 1, 101));
    algo_cache_close(c);
    assert_string_not_equal(only_file(p), "");
    assert_int_equal(stat(p->folder, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
    c = algo_cache_open(p->folder, "cublaslt", WORDS, KEY);
    assert_true(has(c, 1, 101) && has(c, 2, 102) && !has(c, 3, 103));
    algo_cache_close(c);
}

static void others(void **state) // another GPU, another layout of keys: files of their own
{
    struct place *p = *state;
    write_some(p, 0, 3);
    struct algo_cache *c = algo_cache_open(p->folder, "cublaslt", "GPU Other", KEY);
    assert_false(has(c, 1, 101));
    algo_cache_close(c);
    c = algo_cache_open(p->folder, "cublaslt", WORDS, KEY - 1);
    assert_false(has(c, 1, 101));
    algo_cache_close(c);
    // Their contents under our name
    char moved[600];
    snprintf(moved, sizeof moved, "%s.mine", only_file(p));
    assert_int_equal(rename(p->file, moved), 0);
    c = algo_cache_open(p->folder, "cublaslt", "GPU Other", KEY);
    put(c, 1, 101);
    algo_cache_close(c);
    char theirs[600], mine[600];
    snprintf(mine, sizeof mine, "%s", p->file);
    assert_int_equal(unlink(moved), 0);
    snprintf(theirs, sizeof theirs, "%s", only_file(p));
    assert_int_equal(rename(theirs, mine), 0);
    c = algo_cache_open(p->folder, "cublaslt", WORDS, KEY);
    assert_false(has(c, 1, 101));
    algo_cache_close(c);
}

static void merged(void **state) // two that read the same file and both write
{
    struct place *p = *state;
    write_some(p, 0, 2);
    struct algo_cache *a = algo_cache_open(p->folder, "cublaslt", WORDS, KEY),
                      *b = algo_cache_open(p->folder, "cublaslt", WORDS, KEY);
    put(a, 10, 110);
    put(b, 20, 120);
    put(b, 0, 7); // b's own choice stays b's
    algo_cache_close(a);
    algo_cache_save(b);
    assert_true(has(b, 10, 110) && has(b, 0, 7));
    algo_cache_close(b);
    a = algo_cache_open(p->folder, "cublaslt", WORDS, KEY);
    assert_true(has(a, 0, 7) && has(a, 1, 101) && has(a, 10, 110) && has(a, 20, 120));
    algo_cache_close(a);
}

static void at_once(void **state) // processes that write again and again: the file is whole at every moment
{
    struct place *p = *state;
    enum { PROCESSES = 4, ROUNDS = 40 };
    write_some(p, 0, 50);
    for (int i = 0; i < PROCESSES; i++)
        if (fork() == 0) {
            for (int j = 0; j < ROUNDS; j++)
                write_some(p, 1000 * (i + 1) + j, 1000 * (i + 1) + j + 1);
            _exit(0);
        }
    for (int j = 0; j < ROUNDS; j++) {
        struct algo_cache *c = algo_cache_open(p->folder, "cublaslt", WORDS, KEY);
        for (int64_t i = 0; i < 50; i++)
            assert_true(has(c, i, (uint64_t)i + 100));
        algo_cache_close(c);
    }
    for (int i = 0; i < PROCESSES; i++) {
        int status = 1;
        assert_true(wait(&status) > 0);
        assert_int_equal(status, 0);
    }
    assert_string_not_equal(only_file(p), ""); // and nothing is left beside it
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

static void damaged(void **state) // cut at each length, and each byte changed: an entry is right or is not there
{
    struct place *p = *state;
    size_t n;
    write_some(p, 0, 3);
    char *text = contents(only_file(p), &n);
    int lost = 0;
    for (size_t i = 0; i < 2 * n; i++) {
        char *copy = calloc(1, n + 1);
        memcpy(copy, text, n);
        if (i >= n)
            copy[i - n] ^= 1;
        rewrite(p->file, copy, i < n ? i : n);
        free(copy);
        struct algo_cache *c = algo_cache_open(p->folder, "cublaslt", WORDS, KEY);
        int64_t key[KEY];
        uint64_t algo[ALGO_WORDS];
        for (int64_t j = 0; j < 3; j++) {
            key_of(j, key);
            if (algo_cache_find(c, key, algo))
                assert_true(has(c, j, (uint64_t)j + 100));
            else
                lost++;
        }
        algo_cache_close(c);
    }
    assert_true(lost > 0);
    free(text);
    // What comes next mends it.
    rewrite(p->file, "no such thing\n\0\n", 16);
    write_some(p, 7, 8);
    struct algo_cache *c = algo_cache_open(p->folder, "cublaslt", WORDS, KEY);
    assert_true(has(c, 7, 107));
    algo_cache_close(c);
}

static void in_the_way(void **state)
{
    struct place *p = *state;
    int64_t key[KEY] = {0};
    uint64_t algo[ALGO_WORDS];
    const char *folders[] = {NULL, "/dev/null/x", "/proc/none"};
    for (size_t i = 0; i < 3; i++) {
        struct algo_cache *c = algo_cache_open(folders[i], "cublaslt", WORDS, KEY);
        put(c, 1, 101);
        algo_cache_save(c);
        assert_true(has(c, 1, 101) && !algo_cache_find(c, key, algo));
        algo_cache_close(c);
    }
    write_some(p, 0, 1);
    assert_int_equal(unlink(only_file(p)), 0);
    assert_int_equal(mkfifo(p->file, 0600), 0); // nobody writes into it: reading it must not wait
    write_some(p, 1, 2);
    struct algo_cache *c = algo_cache_open(p->folder, "cublaslt", WORDS, KEY);
    assert_true(has(c, 1, 101));
    algo_cache_close(c);
    assert_int_equal(unlink(p->file), 0);
    assert_int_equal(mkdir(p->file, 0700), 0);
    write_some(p, 1, 2);
    assert_int_equal(rmdir(only_file(p)), 0); // no temporary file beside it
    assert_null(algo_cache_open(p->folder, "cublaslt", WORDS, 0));
    assert_null(algo_cache_open(p->folder, "cublaslt", WORDS, ALGO_KEY_MAX + 1));
    algo_cache_close(NULL);
}

static void full_disk(void **state)
{
    struct place *p = *state;
    write_some(p, 0, 2);
    only_file(p);
    const pid_t child = fork();
    if (child == 0) { // no file may grow beyond a few bytes: as on a disk without room
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){40, 40});
        write_some(p, 2, 9);
        _exit(0);
    }
    int status = 1;
    assert_true(waitpid(child, &status, 0) == child);
    assert_int_equal(status, 0);
    struct algo_cache *c = algo_cache_open(p->folder, "cublaslt", WORDS, KEY);
    assert_true(has(c, 0, 100) && has(c, 1, 101) && !has(c, 2, 102));
    algo_cache_close(c);
    assert_string_not_equal(only_file(p), "");
}

static void folders(void **state)
{
    char out[64];
    (void)state;
    setenv("HOME", "/home/u", 1);
    setenv("XDG_CACHE_HOME", "/c", 1);
    assert_true(algo_cache_folder(out, sizeof out));
    assert_string_equal(out, "/c/ditfleet");
    setenv("XDG_CACHE_HOME", "relative", 1); // the standard says: to be passed over
    assert_true(algo_cache_folder(out, sizeof out));
    assert_string_equal(out, "/home/u/.cache/ditfleet");
    unsetenv("XDG_CACHE_HOME");
    assert_false(algo_cache_folder(out, 8));
    unsetenv("HOME");
    assert_false(algo_cache_folder(out, sizeof out));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(found_again, place_set_up, place_tear_down),
        cmocka_unit_test_setup_teardown(others, place_set_up, place_tear_down),
        cmocka_unit_test_setup_teardown(merged, place_set_up, place_tear_down),
        cmocka_unit_test_setup_teardown(at_once, place_set_up, place_tear_down),
        cmocka_unit_test_setup_teardown(damaged, place_set_up, place_tear_down),
        cmocka_unit_test_setup_teardown(in_the_way, place_set_up, place_tear_down),
        cmocka_unit_test_setup_teardown(full_disk, place_set_up, place_tear_down),
        cmocka_unit_test(folders),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

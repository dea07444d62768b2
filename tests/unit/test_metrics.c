// The text of /metrics under a strict parser of OpenMetrics 1.0, and what /healthz says.
//
//   test_metrics            the tests
//   test_metrics --check    whether standard input is OpenMetrics; prints the families' names
#include "supervisor/metrics.h"

#include <ctype.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

// ---- a parser that knows what is written here, and takes nothing else

enum { FAMILIES = 64, SAMPLES = 2000, NAME = 80 };

struct parsed_family {
    char name[NAME], type[16];
    bool has_help, has_unit, over; // over: another one has begun since
};

struct parsed_sample {
    char series[400]; // name and labels as written
    double value;
};

struct parsed {
    struct parsed_family families[FAMILIES];
    struct parsed_sample samples[SAMPLES];
    int n_families, n_samples;
    char why[300]; // "": all is well
};

static bool wrong(struct parsed *p, const char *line, const char *what)
{
    if (!*p->why)
        snprintf(p->why, sizeof p->why, "%s: %.200s", what, line);
    return false;
}

// Length of a name at s: [a-zA-Z_:][a-zA-Z0-9_:]*; 0: none.
static size_t name_length(const char *s)
{
    size_t n = 0;
    while (isalpha((unsigned char)s[n]) || s[n] == '_' || s[n] == ':' || (n && isdigit((unsigned char)s[n])))
        n++;
    return n;
}

static bool ends_with(const char *text, size_t n, const char *end)
{
    return n >= strlen(end) && memcmp(text + n - strlen(end), end, strlen(end)) == 0;
}

static struct parsed_family *last_family(struct parsed *p)
{
    return p->n_families ? &p->families[p->n_families - 1] : NULL;
}

static bool known_type(const char *type)
{
    static const char *const types[] = {"counter", "gauge"}; // those that the older text format has, too
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(types[i], type) == 0)
            return true;
    return false;
}

// Samples of other families that this name would clash with: the format forbids "x" beside a counter "x".
static bool begin_family(struct parsed *p, const char *line, const char *name, const char *type)
{
    const size_t n = strlen(name);
    for (int i = 0; i < p->n_families; i++) {
        const char *other = p->families[i].name;
        if (strcmp(other, name) == 0)
            return wrong(p, line, "the family was there before");
        const size_t m = strlen(other);
        if ((strncmp(other, name, n) == 0 && strcmp(other + n, "_total") == 0) ||
            (strncmp(name, other, m) == 0 && strcmp(name + m, "_total") == 0))
            return wrong(p, line, "clashes with a sample of another family");
    }
    if (p->n_families == FAMILIES || n >= NAME || !known_type(type))
        return wrong(p, line, "a type that is not known");
    if (ends_with(name, n, "_total"))
        return wrong(p, line, "a family's name has no suffix of samples");
    struct parsed_family *f = &p->families[p->n_families++];
    snprintf(f->name, sizeof f->name, "%s", name);
    snprintf(f->type, sizeof f->type, "%s", type);
    return true;
}

static bool take_comment(struct parsed *p, const char *line)
{
    char kind[8] = "", name[NAME] = "", rest[300] = "", tail[2] = "";
    if (sscanf(line, "# %7[A-Z] %79[a-zA-Z0-9_:] %299[^\n]%1s", kind, name, rest, tail) < 3 ||
        name_length(name) != strlen(name) || line[2] == ' ')
        return wrong(p, line, "no line of metadata");
    if (strcmp(kind, "TYPE") == 0)
        return begin_family(p, line, name, rest);
    struct parsed_family *f = last_family(p);
    if (!f || strcmp(f->name, name) != 0 || f->over)
        return wrong(p, line, "metadata of a family that is not the current one");
    if (strcmp(kind, "UNIT") == 0) {
        char suffix[NAME + 8];
        snprintf(suffix, sizeof suffix, "_%.79s", rest);
        if (f->has_unit || !ends_with(name, strlen(name), suffix))
            return wrong(p, line, "a unit that is no suffix of the name");
        return f->has_unit = true;
    }
    if (strcmp(kind, "HELP") != 0 || f->has_help || strchr(rest, '\\'))
        return wrong(p, line, "no line of metadata");
    return f->has_help = true;
}

// {name="value",...}: its length, 0 for none; -1: malformed.
static int labels_length(const char *s)
{
    const char *at = s;
    if (*at != '{')
        return 0;
    do {
        at++;
        const size_t n = name_length(at);
        if (!n || at[n] != '=' || at[n + 1] != '"')
            return -1;
        for (at += n + 2; *at != '"'; at++)
            if (!*at || *at == '\n' || (*at == '\\' && !strchr("\\\"n", *++at)))
                return -1;
        at++;
    } while (*at == ',');
    return *at == '}' ? (int)(at + 1 - s) : -1;
}

static bool take_sample(struct parsed *p, const char *line)
{
    struct parsed_family *f = last_family(p);
    const size_t n = name_length(line);
    const int labels = labels_length(line + n);
    if (!n || labels < 0 || line[n + (size_t)labels] != ' ')
        return wrong(p, line, "no sample");
    const char *suffix = f && strcmp(f->type, "counter") == 0 ? "_total" : "";
    if (!f || !f->has_help || n != strlen(f->name) + strlen(suffix) || strncmp(line, f->name, strlen(f->name)) != 0 ||
        !ends_with(line, n, suffix))
        return wrong(p, line, "a sample that is not of the current family");
    char *end;
    const char *number = line + n + (size_t)labels + 1;
    const double value = strtod(number, &end);
    if (end == number || *end || isspace((unsigned char)*number) || !isfinite(value) ||
        value < 0) // nothing here is negative
        return wrong(p, line, "no value");
    struct parsed_sample *s = &p->samples[p->n_samples];
    snprintf(s->series, sizeof s->series, "%.*s", (int)n + labels, line);
    s->value = value;
    for (int i = 0; i < p->n_samples; i++)
        if (strcmp(p->samples[i].series, s->series) == 0)
            return wrong(p, line, "the same series twice");
    return ++p->n_samples < SAMPLES ? true : wrong(p, line, "too many samples");
}

// All of text; false: p->why says what is wrong.
static bool parse(const char *text, struct parsed *p)
{
    char line[1000];
    *p = (struct parsed){0};
    for (const char *end; *text; text = end + 1) {
        end = strchr(text, '\n');
        if (!end || end - text >= (ptrdiff_t)sizeof line)
            return wrong(p, text, "a line with no end");
        snprintf(line, sizeof line, "%.*s", (int)(end - text), text);
        if (strcmp(line, "# EOF") == 0)
            return end[1] ? wrong(p, end + 1, "something behind # EOF") : true;
        if (!(*line == '#' ? take_comment(p, line) : take_sample(p, line)))
            return false;
    }
    return wrong(p, "", "no # EOF");
}

static double value_of(const struct parsed *p, const char *series)
{
    for (int i = 0; i < p->n_samples; i++)
        if (strcmp(p->samples[i].series, series) == 0)
            return p->samples[i].value;
    return -1;
}

static bool has_family(const struct parsed *p, const char *name)
{
    for (int i = 0; i < p->n_families; i++)
        if (strcmp(p->families[i].name, name) == 0)
            return true;
    return false;
}

// ---- the tests

static void the_parser_is_strict(void **state)
{
    (void)state;
    static const char *const good = "# TYPE a_seconds counter\n# UNIT a_seconds seconds\n# HELP a_seconds x.\n"
                                    "a_seconds_total{b=\"c\\\"\\n\"} 1.5\n# EOF\n";
    static const char *const bad[] = {
        "",
        "# EOF",
        "# EOF\n\n",
        "\n# EOF\n",
        "a 1\n# EOF\n",
        "# TYPE a gauge\na 1\n# EOF\n",                                                      // no help
        "# TYPE a gauge\n# HELP a x\na 1\na 2\n# EOF\n",                                     // twice
        "# TYPE a gauge\n# HELP a x\na  1\n# EOF\n",                                         // two blanks
        "# TYPE a gauge\n# HELP a x\na 1 \n# EOF\n",                                         // a blank at the end
        "# TYPE a gauge\n# HELP a x\na nan\n# EOF\n",                                        // no number
        "# TYPE a gauge\n# HELP a x\na{} 1\n# EOF\n",                                        // no label
        "# TYPE a gauge\n# HELP a x\na{b=\"\\x\"} 1\n# EOF\n",                               // no escape
        "# TYPE a gauge\n# HELP a x\na{b=\"c} 1\n# EOF\n",                                   // no end
        "# TYPE a counter\n# HELP a x\na 1\n# EOF\n",                                        // no _total
        "# TYPE a_total counter\n# HELP a_total x\na_total 1\n# EOF\n",                      // a family with _total
        "# TYPE a gauge\n# HELP a x\n# UNIT a seconds\na 1\n# EOF\n",                        // not its unit
        "# TYPE a gauge\n# HELP a x\n# TYPE b gauge\n# HELP b x\nb 1\na 1\n# EOF\n",         // mixed
        "# TYPE a gauge\n# HELP a x\na 1\n# TYPE a counter\n# HELP a x\na_total 1\n# EOF\n", // two types
        "# TYPE a histogram\n# HELP a x\n# EOF\n",
        "# TYPE a info\n# HELP a x\na_info 1\n# EOF\n",
        "# TYPE a gauge\n# HELP a x\n# TYPE a_total gauge\n# HELP a_total x\n# EOF\n",
        "# TYPE a gauge\r\n# EOF\n",
    };
    struct parsed *p = malloc(sizeof *p);
    if (!parse(good, p))
        fail_msg("%s", p->why);
    assert_int_equal(p->n_samples, 1);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (parse(bad[i], p))
            fail_msg("taken: %s", bad[i]);
    free(p);
}

static struct parsed *text_of(const struct metrics_numbers *n)
{
    struct parsed *p = malloc(sizeof *p);
    size_t length = 0;
    char *text = metrics_text(n, &length);
    assert_non_null(text);
    assert_int_equal(length, strlen(text));
    if (!parse(text, p))
        fail_msg("%s", p->why);
    free(text);
    return p;
}

static void a_node_that_knows_nothing_yet_says_no_zeros(void **state)
{
    (void)state;
    const struct metrics_numbers n = {0};
    struct parsed *p = text_of(&n);
    assert_true(value_of(p, "ditfleet_redis_up") == 0);
    assert_false(has_family(p, "ditfleet_backlog_gpu_seconds"));
    assert_false(has_family(p, "ditfleet_dead_letters"));
    assert_true(has_family(p, "ditfleet_groups"));
    assert_true(value_of(p, "ditfleet_capacity_gpus") == 0);
    free(p);
}

static void every_number_is_in_its_place(void **state)
{
    (void)state;
    struct queue_pool pools[] = {
        {"demo@1", 3, 1, 2, 30500, 10000, 20007, 12345},
        {"odd\"\\\n@2", 0, 0, 0, 0, 0, 0, 0}, // cannot be, and must not break the text
    };
    const struct group_numbers groups[] = {
        {.name = "a",
         .state = GROUP_READY,
         .restarts = 4,
         .ranks = 2,
         .stage = {[STAGE_DENOISE] = 2},
         .busy_s = 7.5,
         .lifetime_s = 20},
        {.name = "b", .state = GROUP_READY, .ranks = 3, .stage = {[STAGE_IDLE] = 3}, .lifetime_s = 30},
        {.name = "c", .state = GROUP_FAILED, .ranks = 8},
    };
    const struct metrics_numbers n = {.groups = groups,
                                      .n_groups = 3,
                                      .utilisation = 0.25,
                                      .queue = {.asked = true,
                                                .up = true,
                                                .known = true,
                                                .age_s = 0.5,
                                                .pools = pools,
                                                .n_pools = 2,
                                                .stats = {.succeeded = 100,
                                                          .dead = 2,
                                                          .cancelled = 3,
                                                          .expired = 4,
                                                          .refused = 5,
                                                          .retries = 6,
                                                          .dead_letter = 7,
                                                          .waiting = 8}}};
    static const struct {
        const char *series;
        double value;
    } want[] = {
        {"ditfleet_redis_up", 1},
        {"ditfleet_queue_age_seconds", 0.5},
        {"ditfleet_backlog_gpu_seconds{pool=\"demo@1\",state=\"queued\"}", 30.5},
        {"ditfleet_backlog_gpu_seconds{pool=\"demo@1\",state=\"delayed\"}", 10},
        {"ditfleet_backlog_gpu_seconds{pool=\"demo@1\",state=\"working\"}", 20.007},
        {"ditfleet_jobs{pool=\"demo@1\",state=\"queued\"}", 3},
        {"ditfleet_jobs{pool=\"demo@1\",state=\"delayed\"}", 1},
        {"ditfleet_jobs{pool=\"demo@1\",state=\"working\"}", 2},
        {"ditfleet_jobs{pool=\"odd\\\"\\\\\\n@2\",state=\"queued\"}", 0},
        {"ditfleet_oldest_job_seconds{pool=\"demo@1\"}", 12.345},
        {"ditfleet_finished_jobs_total{outcome=\"succeeded\"}", 100},
        {"ditfleet_finished_jobs_total{outcome=\"dead\"}", 2},
        {"ditfleet_finished_jobs_total{outcome=\"cancelled\"}", 3},
        {"ditfleet_finished_jobs_total{outcome=\"expired\"}", 4},
        {"ditfleet_finished_jobs_total{outcome=\"refused\"}", 5},
        {"ditfleet_retries_total", 6},
        {"ditfleet_dead_letters", 7},
        {"ditfleet_unadmitted_jobs", 8},
        {"ditfleet_groups{state=\"ready\"}", 2},
        {"ditfleet_groups{state=\"failed\"}", 1},
        {"ditfleet_groups{state=\"draining\"}", 0},
        {"ditfleet_ranks{group=\"a\",stage=\"denoise\"}", 2},
        {"ditfleet_ranks{group=\"b\",stage=\"idle\"}", 3},
        {"ditfleet_ranks{group=\"c\",stage=\"idle\"}", 0},
        {"ditfleet_capacity_gpus", 5},
        {"ditfleet_utilisation", 0.25},
        {"ditfleet_group_restarts_total{group=\"a\"}", 4},
        {"ditfleet_busy_seconds_total{group=\"a\"}", 7.5},
        {"ditfleet_rank_seconds_total{group=\"b\"}", 30},
    };
    struct parsed *p = text_of(&n);
    for (size_t i = 0; i < sizeof want / sizeof *want; i++)
        if (fabs(value_of(p, want[i].series) - want[i].value) > 1e-9)
            fail_msg("%s is %g, not %g", want[i].series, value_of(p, want[i].series), want[i].value);
    assert_true(has_family(p, "ditfleet_build_info"));
    free(p);
}

static void health_has_a_reason(void **state)
{
    (void)state;
    char text[600];
    struct metrics_numbers n = {0};
    assert_int_equal(metrics_health(&n, text, sizeof text), 200); // Redis has not been asked yet
    assert_string_equal(text, "ok\n");
    n.queue.asked = n.queue.up = true;
    assert_int_equal(metrics_health(&n, text, sizeof text), 200);
    n.queue.up = false;
    snprintf(n.queue.error, sizeof n.queue.error, "connection refused");
    assert_int_equal(metrics_health(&n, text, sizeof text), 503);
    assert_string_equal(text, "Redis does not answer: connection refused\n");
    n.queue.up = true;
    n.loop_age_s = METRICS_LOOP_SECONDS + 1;
    assert_int_equal(metrics_health(&n, text, sizeof text), 503);
    assert_non_null(strstr(text, "loop"));
}

static int check_input(void)
{
    enum { MOST = 1 << 20 };
    char *text = malloc(MOST);
    struct parsed *p = malloc(sizeof *p);
    const size_t n = fread(text, 1, MOST - 1, stdin);
    text[n] = 0;
    const bool good = strlen(text) == n && parse(text, p);
    for (int i = 0; good && i < p->n_families; i++)
        puts(p->families[i].name);
    if (!good)
        fprintf(stderr, "%s\n", strlen(text) == n ? p->why : "a NUL byte");
    free(text);
    free(p);
    return good ? 0 : 1;
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--check") == 0)
        return check_input();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_parser_is_strict),
        cmocka_unit_test(a_node_that_knows_nothing_yet_says_no_zeros),
        cmocka_unit_test(every_number_is_in_its_place),
        cmocka_unit_test(health_has_a_reason),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

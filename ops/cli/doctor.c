// ditfleet doctor: what would keep this machine from serving, found without changing anything: one line a finding, and
// what to do about it.
#include <ctype.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "ops/cli/cli.h"
#include "ops/cli/doctor.h"
#include "ops/cli/json.h"
#include "supervisor/probe.h"

static const char *const verdicts[] = {[VERDICT_OK] = "ok", [VERDICT_WARN] = "warn", [VERDICT_FAIL] = "FAIL"};

// ---- for the parts

static void clean(char *text)
{
    for (; *text; text++)
        if (iscntrl((unsigned char)*text))
            *text = '?';
}

void doctor_add(struct doctor *d, enum verdict verdict, const char *name, const char *fix, const char *format, ...)
{
    struct findings *all = d->findings;
    const int n = __atomic_load_n(&all->n, __ATOMIC_ACQUIRE);
    if (n >= DOCTOR_MAX_FINDINGS)
        return;
    struct finding *f = &all->list[n];
    va_list args;
    f->verdict = verdict;
    snprintf(f->name, sizeof f->name, "%s", name);
    va_start(args, format);
    vsnprintf(f->found, sizeof f->found, format, args);
    va_end(args);
    snprintf(f->fix, sizeof f->fix, "%s", fix ? fix : "");
    clean(f->found);
    clean(f->fix);
    __atomic_store_n(&all->n, n + 1, __ATOMIC_RELEASE);
}

struct guarded {
    struct doctor *d;
    void (*part)(struct doctor *d);
};

static void guarded_body(void *arg)
{
    const struct guarded *g = arg;
    g->part(g->d);
}

void doctor_guard(struct doctor *d, const char *name, double seconds, void (*part)(struct doctor *d), const char *fix)
{
    struct guarded g = {d, part};
    struct err err = {.code = ERR_NONE};
    if (probe_run(guarded_body, &g, "the check", seconds, &err) != 0)
        doctor_add(d, VERDICT_FAIL, name, fix, "%s", err.text);
}

const char *doctor_line(char out[DOCTOR_LINE], const char *path_format, ...)
{
    char path[512];
    va_list args;
    va_start(args, path_format);
    vsnprintf(path, sizeof path, path_format, args);
    va_end(args);
    FILE *f = fopen(path, "re");
    if (!f || !fgets(out, DOCTOR_LINE, f))
        out[0] = '\0';
    if (f)
        fclose(f);
    out[strcspn(out, "\n")] = '\0';
    return out;
}

const char *doctor_size(char out[DOCTOR_SIZE], double bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    size_t u = 0;
    if (bytes < 0) {
        snprintf(out, DOCTOR_SIZE, "unknown");
        return out;
    }
    for (; bytes >= 1024 && u + 1 < sizeof units / sizeof *units; u++)
        bytes /= 1024;
    snprintf(out, DOCTOR_SIZE, "%.*f %s", u && bytes < 1000 ? 1 : 0, bytes, units[u]);
    return out;
}

const char *doctor_s(long n)
{
    return n == 1 ? "" : "s";
}

// ---- what is printed

static void count(const struct findings *all, int *warnings, int *failures)
{
    *warnings = *failures = 0;
    for (int i = 0; i < all->n; i++) {
        *warnings += all->list[i].verdict == VERDICT_WARN;
        *failures += all->list[i].verdict == VERDICT_FAIL;
    }
}

static void print_lines(const struct doctor *d)
{
    int warnings, failures;
    for (int i = 0; i < d->findings->n; i++) {
        const struct finding *f = &d->findings->list[i];
        printf("%-4s  %-18s %s%s%s\n", verdicts[f->verdict], f->name, f->found, *f->fix ? "; fix: " : "", f->fix);
        if (strcmp(f->name, "topology") == 0)
            doctor_print_ways(d->gpus);
    }
    count(d->findings, &warnings, &failures);
    printf("%d checks: %d failed, %d warning%s\n", d->findings->n, failures, warnings, doctor_s(warnings));
}

// Text that came from a driver or a path need not be UTF-8.
static json_t *text_json(const char *text)
{
    json_t *string = json_string(text);
    return string ? string : json_string("(not UTF-8)");
}

static void print_json(const struct doctor *d)
{
    int warnings, failures;
    json_t *checks = json_array();
    count(d->findings, &warnings, &failures);
    for (int i = 0; i < d->findings->n; i++) {
        const struct finding *f = &d->findings->list[i];
        json_array_append_new(checks, json_pack("{s:s,s:s,s:o,s:o}", "check", f->name, "verdict", verdicts[f->verdict],
                                                "found", text_json(f->found), "fix", text_json(f->fix)));
    }
    json_print(json_pack("{s:b,s:i,s:i,s:s,s:o,s:o,s:o}", "good", failures == 0, "failures", failures, "warnings",
                         warnings, "driver", d->gpus->driver, "checks", checks, "gpus", doctor_gpus_json(d->gpus),
                         "topology", doctor_ways_json(d->gpus)));
}

// ---- the command

static int doctor(struct doctor *d, bool json)
{
    int warnings, failures;
    doctor_look(&d->host);
    doctor_ask(d);
    doctor_host(d);
    doctor_gpus(d);
    doctor_cuda(d);
    if (d->config)
        doctor_fleet(d);
    (json ? print_json : print_lines)(d);
    count(d->findings, &warnings, &failures);
    return failures ? CLI_FAILED : CLI_OK;
}

static int run(const struct cli_command *self, int argc, char **argv)
{
    struct doctor d = {.gpus = calloc(1, sizeof *d.gpus), .findings = probe_alloc(sizeof *d.findings)};
    bool json = false;
    const struct cli_flag flags[] = {
        {"--config", "FILE", "also check what this supervisor's configuration names", CLI_STRING, &d.config, 0, 0},
        {"--json", NULL, "print one JSON object", CLI_BOOL, &json, 0, 0}};
    int code = cli_parse(self, flags, sizeof flags / sizeof *flags, NULL, argc, argv, NULL, NULL);
    if (code < 0 && d.gpus && d.findings)
        code = doctor(&d, json);
    else if (code < 0)
        code = cli_fail(&(struct err){.code = ERR_NO_MEMORY, .text = "out of memory"});
    probe_free(d.findings, sizeof *d.findings);
    free(d.gpus);
    return code;
}

const struct cli_command cli_doctor = {"doctor", "",
                                       "check this machine's GPUs, driver and limits, and say what to fix", run, true};

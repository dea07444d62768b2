#include "ops/cli/cli.h"
#include "ops/cli/manual.h"
#include "ops/cli/nearest.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

// Fields that say how a job travels, and where to; no flags of a command whose job stays here.
static const char *const travelling[] = {
    "id",          "output.url",   "output.headers", "output.file", "callback_url",  "priority",
    "deadline_ms", "max_attempts", "traceparent",    "labels",      "not_before_ms",
};

bool cli_job_flag(const struct cli_command *self, const struct job_rule *rule, char name[CLI_FLAG_NAME])
{
    const char *dot = strchr(rule->name, '.');
    if (strcmp(rule->name, "output") == 0 || strncmp(rule->name, "labels.", 7) == 0 || (dot && strchr(dot + 1, '.')))
        return false; // a part of what another flag sets, or the whole of what others set
    for (size_t i = 0; self->local && i < sizeof travelling / sizeof *travelling; i++)
        if (strcmp(rule->name, travelling[i]) == 0)
            return false;
    snprintf(name, CLI_FLAG_NAME, "--%s", rule->name);
    for (char *c = name; *c; c++)
        if (*c == '_' || *c == '.')
            *c = '-';
    return true;
}

const struct cli_flag *cli_find_flag(const struct cli_flag *flags, int n_flags, const char *name)
{
    for (int i = 0; i < n_flags; i++)
        if (strcmp(flags[i].name, name) == 0)
            return &flags[i];
    return NULL;
}

static int usage_error(const struct cli_command *self, const char *format, const char *what, const char *why)
{
    fprintf(stderr, "ditfleet %s: ", self->name);
    fprintf(stderr, format, what, why);
    fprintf(stderr, "\ntry: ditfleet %s --help\n", self->name);
    return CLI_USAGE;
}

// True when text is a number within the flag's bounds.
static bool set_number(const struct cli_flag *flag, const char *text)
{
    char *end;
    errno = 0;
    double value = strtod(text, &end);
    if (errno || end == text || *end || !isfinite(value) || value < flag->min || value > flag->max)
        return false;
    if (flag->kind == CLI_DOUBLE)
        *(double *)flag->target = value;
    else if (value != floor(value))
        return false;
    else
        *(int *)flag->target = (int)value;
    return true;
}

static int set_flag(const struct cli_command *self, const struct cli_flag *flag, const char *text)
{
    char why[96];
    if (flag->kind == CLI_BOOL) {
        *(bool *)flag->target = true;
        return -1;
    }
    if (flag->kind == CLI_STRING) {
        *(const char **)flag->target = text;
        return -1;
    }
    if (set_number(flag, text))
        return -1;
    snprintf(why, sizeof why, "%s from %g to %g", flag->kind == CLI_INT ? "a whole number" : "a number", flag->min,
             flag->max);
    return usage_error(self, "%s takes %s", flag->name, why);
}

// The rule of a field's flag, which may also be spelled as the field is: --num_inference_steps, --output.url.
static const struct job_rule *find_job_flag(const struct cli_command *self, const char *name)
{
    size_t count;
    const struct job_rule *rules = job_rules(&count);
    char wanted[CLI_FLAG_NAME], flag[CLI_FLAG_NAME];
    snprintf(wanted, sizeof wanted, "%s", name);
    for (char *c = wanted; *c; c++)
        if (*c == '_' || *c == '.')
            *c = '-';
    for (size_t i = 0; i < count; i++)
        if (cli_job_flag(self, &rules[i], flag) && strcmp(flag, wanted) == 0)
            return &rules[i];
    return NULL;
}

static int set_job_flag(const struct cli_command *self, const struct job_rule *rule, Ditfleet__V1__Job *job,
                        const char *text)
{
    struct err err = {.code = ERR_NONE};
    if (job_set_field(job, rule->name, text, &err) == 0)
        return -1;
    return usage_error(self, "%s%s", err.text, "");
}

static int unknown_flag(const struct cli_command *self, const struct cli_flag *flags, int n_flags, bool job,
                        const char *name)
{
    size_t count;
    const struct job_rule *rules = job_rules(&count);
    char job_flag[CLI_FLAG_NAME], meant[CLI_FLAG_NAME + 24] = "";
    struct nearest nearest = {.typed = name};
    for (int i = 0; i < n_flags; i++)
        nearest_offer(&nearest, flags[i].name);
    if (nearest.word)
        snprintf(meant, sizeof meant, "; did you mean %s?", nearest.word);
    for (size_t i = 0; job && i < count; i++) {
        const int best = nearest.word ? nearest.distance : -1;
        if (!cli_job_flag(self, &rules[i], job_flag))
            continue;
        nearest_offer(&nearest, job_flag);
        if (nearest.word == job_flag &&
            nearest.distance != best) // the buffer does not outlive this turn: kept in meant
            snprintf(meant, sizeof meant, "; did you mean %s?", job_flag);
    }
    return usage_error(self, "unknown flag %s%s", name, meant);
}

// One flag at argv[*i], and its value, which may be the next argument. Returns -1 or an exit code.
static int take_flag(const struct cli_command *self, const struct cli_flag *flags, int n_flags, Ditfleet__V1__Job *job,
                     int argc, char **argv, int *i)
{
    char name[64];
    const char *arg = argv[*i], *equals = strncmp(arg, "--", 2) == 0 ? strchr(arg, '=') : NULL;
    snprintf(name, sizeof name, "%.*s", equals ? (int)(equals - arg) : 63, arg);
    const struct cli_flag *flag = cli_find_flag(flags, n_flags, name);
    const struct job_rule *rule = !flag && job && name[1] == '-' ? find_job_flag(self, name) : NULL;
    if (!flag && !rule)
        return unknown_flag(self, flags, n_flags, job != NULL, name);
    const char *text = equals ? equals + 1 : NULL;
    if (flag && flag->kind == CLI_BOOL && text)
        return usage_error(self, "%s takes no value%s", name, "");
    if (!text && (rule || flag->kind != CLI_BOOL)) {
        if (*i + 1 >= argc)
            return usage_error(self, "%s needs a value%s", name, "");
        text = argv[++*i];
    }
    return flag ? set_flag(self, flag, text) : set_job_flag(self, rule, job, text);
}

int cli_parse(const struct cli_command *self, const struct cli_flag *flags, int n_flags, Ditfleet__V1__Job *job,
              int argc, char **argv, const char **operands, int *n_operands)
{
    bool only_operands = false;
    enum manual_form form;
    if (n_operands)
        *n_operands = 0;
    for (int i = 1; i < argc; i++) {
        if (only_operands || argv[i][0] != '-' || argv[i][1] == '\0') {
            if (!n_operands)
                return usage_error(self, "unexpected argument %.80s%s", argv[i], "");
            operands[(*n_operands)++] = argv[i];
        } else if (strcmp(argv[i], "--") == 0) {
            only_operands = true;
        } else if (manual_asked(argv[i], &form)) {
            manual_command(form, self, flags, n_flags, job != NULL);
            return CLI_OK;
        } else {
            int rc = take_flag(self, flags, n_flags, job, argc, argv, &i);
            if (rc >= 0)
                return rc;
        }
    }
    return -1;
}

int cli_operands(const struct cli_command *self, int n, int wanted)
{
    if (n == wanted)
        return -1;
    return usage_error(self, n < wanted ? "missing argument: %s%s" : "too many arguments: %s%s", self->arguments, "");
}

void cli_numbered(const char *path, uint32_t index, uint32_t count, char *out, size_t size)
{
    const char *slash = strrchr(path, '/'), *dot = strrchr(path, '.');
    if (dot && slash && dot < slash)
        dot = NULL;
    if (count == 1)
        snprintf(out, size, "%s", path);
    else
        snprintf(out, size, "%.*s-%u%s", dot ? (int)(dot - path) : (int)strlen(path), path, index, dot ? dot : "");
}

int cli_fail(const struct err *err)
{
    fprintf(stderr, "ditfleet: %s\n", err->text);
    if (err->code == ERR_INVALID)
        return CLI_USAGE;
    return err->code == ERR_UNAVAILABLE || err->code == ERR_TIMEOUT ? CLI_UNAVAILABLE : CLI_FAILED;
}

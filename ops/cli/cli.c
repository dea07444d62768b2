#include "ops/cli/cli.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void print_job_flags(void)
{
    size_t count;
    const struct job_rule *rules = job_rules(&count);
    printf("\nThe job:\n");
    for (size_t i = 0; i < count; i++) {
        char name[64], allowed[256];
        snprintf(name, sizeof name, "%s", rules[i].name);
        if (strchr(name, '.') && strncmp(name, "output.", 7) != 0)
            continue; // parts of a repeated field are set through the field
        for (char *c = name; *c; c++)
            if (*c == '_')
                *c = '-';
        printf("  --%-25s %s\n  %27s (%s%s%s)\n", name, rules[i].doc, "",
               job_rule_allowed(&rules[i], allowed, sizeof allowed), rules[i].fallback ? "; default: " : "",
               rules[i].fallback ? rules[i].fallback : "");
    }
}

static void print_help(const struct cli_command *self, const struct cli_flag *flags, int n_flags, bool job)
{
    printf("ditfleet %s: %s\n\nusage: ditfleet %s [flags] %s\n\n", self->name, self->summary, self->name,
           self->arguments);
    for (int i = 0; i < n_flags; i++) {
        char head[64];
        snprintf(head, sizeof head, "%s %s", flags[i].name, flags[i].value ? flags[i].value : "");
        printf("  %-27s %s\n", head, flags[i].doc);
    }
    if (job)
        print_job_flags();
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
    if (!text)
        return usage_error(self, "%s needs a value: %s", flag->name, flag->value);
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

static int set_job_flag(const struct cli_command *self, Ditfleet__V1__Job *job, const char *name, const char *text)
{
    struct err err = {.code = ERR_NONE};
    if (job_set_field(job, name + 2, text ? text : "", &err) == 0)
        return -1;
    if (err.code == ERR_NOT_FOUND)
        return usage_error(self, "unknown flag %s%s", name, "");
    return usage_error(self, "%s: %s", name, err.text);
}

int cli_parse(const struct cli_command *self, const struct cli_flag *flags, int n_flags, Ditfleet__V1__Job *job,
              int argc, char **argv, const char **operands, int *n_operands)
{
    bool only_operands = false;
    if (n_operands)
        *n_operands = 0;
    for (int i = 1; i < argc; i++) {
        if (only_operands || argv[i][0] != '-' || argv[i][1] == '\0') {
            if (!n_operands)
                return usage_error(self, "unexpected argument %s%s", argv[i], "");
            operands[(*n_operands)++] = argv[i];
            continue;
        }
        if (strcmp(argv[i], "--") == 0) {
            only_operands = true;
            continue;
        }
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            print_help(self, flags, n_flags, job != NULL);
            return CLI_OK;
        }
        char name[64];
        const char *equals = strncmp(argv[i], "--", 2) == 0 ? strchr(argv[i], '=') : NULL;
        snprintf(name, sizeof name, "%.*s", equals ? (int)(equals - argv[i]) : 63, argv[i]);
        const struct cli_flag *flag = NULL;
        for (int f = 0; f < n_flags && !flag; f++)
            if (strcmp(flags[f].name, name) == 0)
                flag = &flags[f];
        const bool takes_value = !flag || flag->kind != CLI_BOOL;
        const char *text = equals ? equals + 1 : takes_value && i + 1 < argc ? argv[++i] : NULL;
        int rc;
        if (flag)
            rc = set_flag(self, flag, text);
        else if (job && strncmp(name, "--", 2) == 0)
            rc = set_job_flag(self, job, name, text);
        else
            rc = usage_error(self, "unknown flag %s%s", name, "");
        if (rc >= 0)
            return rc;
    }
    return -1;
}

int cli_fail(const struct err *err)
{
    fprintf(stderr, "ditfleet: %s\n", err->text);
    if (err->code == ERR_INVALID)
        return CLI_USAGE;
    return err->code == ERR_UNAVAILABLE ? CLI_UNAVAILABLE : CLI_FAILED;
}

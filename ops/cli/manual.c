#include "ops/cli/manual.h"

#include <string.h>

#include "proto/conf.h"

// ---- the prose

static const struct prose {
    const char *name, *about, *examples;
} prose[] = {
    {"generate",
     "Makes a job's picture on this machine: no queue, no supervisor. The ranks are processes that share the work; "
     "every plan of them makes the same picture, but for PipeFusion's. The result is the file and, on standard "
     "output, what ran.",
     "ditfleet generate --model ops/demo/model --prompt \"two yellow hearts\" --seed 8 -o hearts.png\n"
     "ditfleet generate --model /srv/models/flux.1-dev --device cuda --prompt \"a cat\" --memory-budget 24GiB"},
    {"submit",
     "Puts one job, or those of a file, into the queue and prints ids and entries, the receipts. With --wait it shows "
     "their progress until their end, and with -o it saves the pictures. Ctrl-C ends the waiting, not the jobs. If a "
     "line of the file is wrong, none is submitted; with an --id the same command may be repeated, and does no job "
     "twice. With --receipt it "
     "asks Redis how safe the submission is: on disks (WAITAOF, from 7.2 on) or in replicas' memory (WAIT); if less "
     "than "
     "asked for, the exit status is 1, though the job is in the queue.",
     "ditfleet submit --model demo --prompt \"a cyan heart\" --output-url \"http://127.0.0.1:9000/{id}.png\" --wait -o "
     "a.png\n"
     "ditfleet submit --model demo --prompt \"a ring\" --output-file /srv/pictures/{id}.png --priority low --json\n"
     "ditfleet submit --model demo --output-file /srv/{id}.png --from prompts.txt --id monday --wait"},
    {"jobs",
     "Lists jobs, the newest first: those that wait, those that run and those that ended not longer ago than the "
     "queue keeps them. Jobs in a tenant's door, not yet admitted, are not among them. Reads page by page: a long "
     "list holds nobody up.",
     "ditfleet jobs --state active\nditfleet jobs --state dead,expired --newer 1h --tenant acme --json"},
    {"drain",
     "The groups of this node, or GROUP, claim no more, finish the job they have if the grace time of the "
     "configuration is long enough for it, give it back to the queue if not, and stop. They stay stopped until they "
     "are resumed or the supervisor starts anew.",
     "ditfleet drain --wait --config /etc/ditfleet/ditfleet.conf\nditfleet drain flux"},
    {"resume", "Starts the groups of this node, or GROUP, that were drained or are given up as failed.",
     "ditfleet resume flux --config /etc/ditfleet/ditfleet.conf"},
    {"show",
     "Prints a job's record: its state, attempts, times, and once it is final its result. ID may be @ENTRY, which "
     "finds a submission that was refused.",
     "ditfleet show cat-1\nditfleet show @1700000000000-0 --json"},
    {"cancel", "A job that waits is gone at once; one that runs stops at its next step. What is final stays as it is.",
     "ditfleet cancel cat-1 cat-2 --tenant acme"},
    {"status",
     "Shows what the supervisor of this node says of its groups and ranks, and what the queue holds, anew every second "
     "until Ctrl-C; where the output is no terminal, once. What cannot be "
     "reached is said on standard error, and the rest is shown.",
     "ditfleet status --config /etc/ditfleet/ditfleet.conf\nditfleet status --json | jq .queue.jobs"},
    {"tenant",
     "A tenant has a door of its own in Redis, a share of the GPUs by its weight, and limits in GPU-seconds: what is "
     "above --rate waits, what is above --max-queued is refused. set changes what is given and leaves the rest. add "
     "prints the line that gives a Redis user the right to its door and to its own records.",
     "ditfleet tenant add acme --weight 2\nditfleet tenant set acme --rate 2 --burst 60 --max-queued 600\n"
     "ditfleet tenant list"},
    {"bench",
     "Runs a model, or an architecture of its real size with weights made up in memory, through the engine as a job "
     "does, and prints times of its stages and operations beside what this machine reaches at best.",
     "ditfleet bench --architecture flux.1-dev --device cuda --what image --compare\n"
     "ditfleet bench --model ops/demo/model --what step --json"},
    {"plan",
     "Lists the plans that some ranks have for a job, with milliseconds of a step, bytes sent and memory; the one "
     "that would be taken is marked. Nothing runs. What `ditfleet tune` measured makes the times this machine's.",
     "ditfleet plan --model ops/demo/model --ranks 4 --width 256 --height 256\n"
     "ditfleet plan --architecture flux.1-dev --ranks 8 --objective throughput --all"},
    {"tune",
     "Measures in some seconds what computing and exchanging costs between so many ranks, and keeps it in the user's "
     "cache, where groups of so many ranks, of the fleet and of generate, find it.",
     "ditfleet tune --ranks 4\n"
     "ditfleet tune --device cuda --ranks 2 --precision int8"},
    {"doctor",
     "Looks at the driver, each GPU, the ways between them, limits and, with --config, at Redis, directories and "
     "models. A line a finding, with what to fix. Nothing is changed.",
     "ditfleet doctor --config /etc/ditfleet/ditfleet.conf"},
    {"config",
     "check reads FILE and says whether a supervisor could start with it here; the error names file, line, key and "
     "what is allowed. example prints every key with its bounds and default, as a file to begin with; man, the same "
     "as the manual page ditfleet.conf(5).",
     "ditfleet config check /etc/ditfleet/ditfleet.conf\nditfleet config example > ditfleet.conf"},
    {"model",
     "list prints the models that the fleet serves. verify opens DIR as a worker does, so that a tensor that is "
     "missing or of another shape is named; looks at every number; and prints the formats of each part, the hash "
     "that results carry, and what one rank takes in memory for the model's default picture. Where DIR has a file "
     "SHA256SUMS, as sha256sum writes it, every file that it names must agree.",
     "ditfleet model list\nditfleet model verify /srv/models/flux.1-dev\n"
     "(cd DIR && find . -name '*.safetensors' | xargs sha256sum > SHA256SUMS)"},
    {"backlog",
     "Prints for each pool the jobs that are queued, delayed and in work, and their price in GPU-seconds. Queued and "
     "working together are what to scale on.",
     "ditfleet backlog\nditfleet backlog --json | jq .total.gpu_seconds"},
    {"dead",
     "Dead letters are DEAD jobs, submissions that were refused and callbacks that were given up. retry gives a job "
     "another life under its id with all its attempts, sends a submission to its door again, makes a callback due; "
     "drop "
     "throws letters away. LETTER is as list prints it; all are those that list prints.",
     "ditfleet dead list --tenant acme\nditfleet dead retry 1700000000000-0\nditfleet dead drop all --code not_found"},
    {"acl",
     "Prints the line that makes a user in Redis with no more rights than it needs: a producer submits as one tenant, "
     "a "
     "worker is what supervisors and workers are, a scaler reads the figures of `ditfleet backlog`, an operator has "
     "this "
     "command line. Put a password in the place of PASSWORD.",
     "ditfleet acl worker\nditfleet acl producer --tenant acme --user acme-web\nditfleet acl scaler | sed "
     "\"s/PASSWORD/$SECRET/\" | redis-cli"},
};

static const struct {
    int status;
    const char *meaning;
} statuses[] = {
    {CLI_OK, "done"},
    {CLI_FAILED, "the job or the operation failed; the reason is on standard error"},
    {CLI_USAGE, "a flag or an argument is wrong; nothing was done"},
    {CLI_UNAVAILABLE, "Redis or the supervisor cannot be reached"},
    {CLI_INTERRUPTED, "interrupted by SIGINT or SIGTERM"},
};

static const struct prose *prose_of(const char *name)
{
    static const struct prose none = {"", "", ""};
    for (size_t i = 0; i < sizeof prose / sizeof *prose; i++)
        if (strcmp(prose[i].name, name) == 0)
            return &prose[i];
    return &none;
}

// ---- one walk over a page, written as text or as roff

struct page {
    FILE *to;
    bool roff;
};

// Words as roff takes them: no line begins with a control character, and minus signs can be copied.
static void put_roff(FILE *to, const char *text)
{
    if (*text == '.' || *text == '\'')
        fputs("\\&", to);
    for (; *text; text++) {
        if (*text == '\\')
            fputs("\\e", to);
        else if (*text == '-')
            fputs("\\-", to);
        else if (*text == '\n') { // and the indentation of the text form
            putc(' ', to);
            text += strspn(text, "\n ") - 1;
        } else {
            putc(*text, to);
        }
    }
}

// Fills lines of text that begin at a column; the first is there already.
static void put_filled(FILE *to, const char *text, int indent)
{
    enum { WIDTH = 100 };
    int column = indent;
    for (const char *word = text + strspn(text, " \n"); *word;) {
        const int length = (int)strcspn(word, " \n");
        if (column + 1 + length > WIDTH && column > indent) {
            fprintf(to, "\n%*s", indent, "");
            column = indent;
        }
        column += fprintf(to, "%s%.*s", column > indent ? " " : "", length, word);
        word += length;
        word += strspn(word, " \n");
    }
    putc('\n', to);
}

static void section(const struct page *p, const char *name)
{
    fprintf(p->to, p->roff ? ".SH %s\n" : "\n%s\n", name);
}

static void paragraph(const struct page *p, const char *text)
{
    if (p->roff) {
        put_roff(p->to, text);
        putc('\n', p->to);
    } else {
        fputs("  ", p->to);
        put_filled(p->to, text, 2);
    }
}

static void item(const struct page *p, const char *head, const char *text)
{
    enum { INDENT = 30 };
    if (p->roff) {
        fputs(".TP\n.B ", p->to);
        put_roff(p->to, head);
        putc('\n', p->to);
        put_roff(p->to, *text ? text : "As the one before.");
        putc('\n', p->to);
        return;
    }
    if (fprintf(p->to, "  %-27s ", head) > INDENT)
        fprintf(p->to, "\n%*s", INDENT, "");
    put_filled(p->to, text, INDENT);
}

static void examples(const struct page *p, const char *lines)
{
    section(p, "EXAMPLES");
    if (p->roff)
        fputs(".nf\n", p->to);
    for (const char *end; *lines; lines = end + (*end == '\n')) {
        char line[200];
        end = lines + strcspn(lines, "\n");
        snprintf(line, sizeof line, "%.*s", (int)(end - lines), lines);
        if (p->roff)
            put_roff(p->to, line);
        else
            fprintf(p->to, "  %s", line);
        putc('\n', p->to);
    }
    if (p->roff)
        fputs(".fi\n", p->to);
}

static void exit_statuses(const struct page *p)
{
    section(p, "EXIT STATUS");
    for (size_t i = 0; i < sizeof statuses / sizeof *statuses; i++) {
        char number[8];
        snprintf(number, sizeof number, "%d", statuses[i].status);
        item(p, number, statuses[i].meaning);
    }
}

static void begin(const struct page *p, const char *name, int chapter, const char *summary)
{
    char upper[64];
    if (!p->roff) {
        fprintf(p->to, "%s: %s\n", name, summary);
        return;
    }
    snprintf(upper, sizeof upper, "%s", name);
    for (char *c = upper; *c; c++)
        *c = *c >= 'a' && *c <= 'z' ? (char)(*c - 'a' + 'A') : *c;
    fprintf(p->to, ".TH %s %d \"\" \"ditfleet " DITFLEET_VERSION "\" \"ditfleet\"\n.SH NAME\n", upper, chapter);
    put_roff(p->to, name);
    fputs(" \\- ", p->to);
    put_roff(p->to, summary);
    putc('\n', p->to);
}

static void synopsis(const struct page *p, const char *usage)
{
    if (!p->roff) {
        fprintf(p->to, "\nusage: %s\n", usage);
        return;
    }
    fputs(".SH SYNOPSIS\n.B ", p->to);
    put_roff(p->to, usage);
    putc('\n', p->to);
}

// ---- a command

static void describe_rule(const struct job_rule *rule, char *text, size_t size)
{
    char allowed[256];
    job_rule_allowed(rule, allowed, sizeof allowed);
    if (rule->separator)
        snprintf(allowed, sizeof allowed, "NAME%cVALUE, up to %zu times", rule->separator, rule->max_items);
    snprintf(text, size, "%s (%s%s%s)", rule->doc, allowed, rule->fallback ? "; default: " : "",
             rule->fallback ? rule->fallback : "");
}

static void job_items(const struct page *p, const struct cli_command *self, const struct cli_flag *flags, int n_flags)
{
    size_t count;
    const struct job_rule *rules = job_rules(&count);
    section(p, "THE JOB, FIELDS NAMED AS IN DIFFUSERS");
    for (size_t i = 0; i < count; i++) {
        char name[CLI_FLAG_NAME], text[600];
        if (!cli_job_flag(self, &rules[i], name) || cli_find_flag(flags, n_flags, name))
            continue;
        describe_rule(&rules[i], text, sizeof text);
        item(p, name, text);
    }
}

static void print_command(const struct page *p, const struct cli_command *self, const struct cli_flag *flags,
                          int n_flags, bool job)
{
    const struct prose *more = prose_of(self->name);
    char name[64], usage[128];
    snprintf(name, sizeof name, p->roff ? "ditfleet-%s" : "ditfleet %s", self->name);
    snprintf(usage, sizeof usage, "ditfleet %s [flags]%s%s", self->name, *self->arguments ? " " : "", self->arguments);
    begin(p, name, 1, self->summary);
    synopsis(p, usage);
    if (*more->about) {
        section(p, "DESCRIPTION");
        paragraph(p, more->about);
    }
    section(p, "FLAGS");
    for (int i = 0; i < n_flags; i++) {
        char head[64];
        snprintf(head, sizeof head, "%s%s%s", flags[i].name, flags[i].value ? " " : "",
                 flags[i].value ? flags[i].value : "");
        item(p, head, flags[i].doc);
    }
    if (job)
        job_items(p, self, flags, n_flags);
    if (*more->examples)
        examples(p, more->examples);
    exit_statuses(p);
    if (p->roff)
        fputs(".SH SEE ALSO\nditfleet(1), ditfleet.conf(5)\n", p->to);
}

// ---- words

// A flag and what may follow it: nothing, words with a separator between, or a placeholder in capitals.
static void print_word(const char *name, const char *value, char separator)
{
    printf("%s%s", name, *value ? " " : "");
    for (; *value; value++)
        putchar(*value == separator ? ' ' : *value);
    putchar('\n');
}

// The first word of each of the ways to call it: "add" and "list" of "add NAME | list".
static void print_verbs(const char *arguments)
{
    for (const char *way = arguments; *way >= 'a' && *way <= 'z'; way += strspn(way, " |")) {
        printf("%.*s\n", (int)strcspn(way, " "), way);
        way += strcspn(way, "|");
    }
}

static void command_words(const struct cli_command *self, const struct cli_flag *flags, int n_flags, bool job)
{
    size_t count;
    const struct job_rule *rules = job_rules(&count);
    print_verbs(self->arguments);
    for (int i = 0; i < n_flags; i++)
        print_word(flags[i].name, flags[i].value ? flags[i].value : "", '|');
    for (size_t i = 0; job && i < count; i++) {
        char name[CLI_FLAG_NAME], type[64], allowed[256];
        if (!cli_job_flag(self, &rules[i], name) || cli_find_flag(flags, n_flags, name))
            continue;
        const char *kind = job_rule_type(&rules[i], type, sizeof type);
        const bool words = kind[0] >= 'A' && kind[0] <= 'Z'; // an enum
        print_word(name, words ? job_rule_allowed(&rules[i], allowed, sizeof allowed) : "VALUE", ',');
    }
    print_word("--help", "", ',');
}

// ---- for callers

bool manual_asked(const char *arg, enum manual_form *form)
{
    static const char *const names[] = {
        [MANUAL_TEXT] = "--help", [MANUAL_PAGE] = "--help=man", [MANUAL_WORDS] = "--help=words"};
    *form = MANUAL_TEXT;
    if (strcmp(arg, "-h") == 0)
        return true;
    for (int i = MANUAL_TEXT; i <= MANUAL_WORDS; i++)
        if (strcmp(arg, names[i]) == 0) {
            *form = (enum manual_form)i;
            return true;
        }
    return false;
}

void manual_command(enum manual_form form, const struct cli_command *self, const struct cli_flag *flags, int n_flags,
                    bool job)
{
    if (form == MANUAL_WORDS)
        command_words(self, flags, n_flags, job);
    else
        print_command(&(struct page){stdout, form == MANUAL_PAGE}, self, flags, n_flags, job);
}

static void print_program(const struct page *p, const struct cli_command *const *commands)
{
    begin(p, "ditfleet", 1, "image generation on a fleet of GPU workers");
    synopsis(p, "ditfleet COMMAND [flags]");
    section(p, "COMMANDS");
    for (int i = 0; commands[i]; i++)
        item(p, commands[i]->name, commands[i]->summary);
    paragraph(p, p->roff ? "Each has a page: ditfleet-COMMAND(1)." : "`ditfleet COMMAND --help` says more.");
    section(p, "ENVIRONMENT");
    item(p, "DITFLEET_REDIS", "the URL of Redis where no flag and no configuration says it");
    item(p, "XDG_CACHE_HOME", "where `tune` keeps what it measured, in ditfleet/; default: ~/.cache");
    exit_statuses(p);
    if (p->roff)
        fputs(".SH SEE ALSO\nditfleet.conf(5), ditfleet\\-submit(1)\n", p->to);
}

void manual_program(FILE *to, enum manual_form form, const struct cli_command *const *commands)
{
    if (form != MANUAL_WORDS)
        print_program(&(struct page){to, form == MANUAL_PAGE}, commands);
    for (int i = 0; form == MANUAL_WORDS && commands[i]; i++)
        fprintf(to, "%s\n", commands[i]->name);
}

// ---- the configuration

struct keys {
    const struct page *page;
    char section[64]; // of the row before
};

static void print_key(void *arg, const struct conf_key *k)
{
    struct keys *keys = arg;
    char head[64], text[600];
    snprintf(head, sizeof head, "[%s%s]", k->section, strcmp(k->section, "group") == 0 ? " NAME" : "");
    if (strcmp(keys->section, head) != 0)
        section(keys->page, head);
    snprintf(keys->section, sizeof keys->section, "%s", head);
    snprintf(text, sizeof text, "%s. Allowed: %s. Default: %s.", k->doc, k->allowed, *k->initial ? k->initial : "none");
    item(keys->page, k->name, text);
}

void manual_configuration(void)
{
    const struct page p = {stdout, true};
    struct keys keys = {.page = &p};
    begin(&p, "ditfleet.conf", 5, "configuration of a node of ditfleet");
    section(&p, "DESCRIPTION");
    paragraph(&p,
              "Sections in brackets, then lines of key = value; # and ; begin comments. The supervisor and its workers "
              "read it, and the command line where --config names it. `ditfleet config check FILE` says whether a "
              "supervisor could start with it; SIGHUP makes a running one read it again.");
    conf_each_key(print_key, &keys);
    fputs(".SH SEE ALSO\nditfleet(1)\n", stdout);
}

// job.c: the table of a job's fields, and everything that reads it: parser checks, validation, flags, documentation.
//
// protobuf-c finds neither bad UTF-8 nor NaN nor unknown enum values, cuts strings at a zero byte and keeps unknown
// fields in silence. So the bytes are walked against the descriptors first (scan), unpacked, and then validated.
#include "proto/job.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <utf8proc.h>

// ---- checks of strings that are more than UTF-8. None echoes the text: URLs and headers carry secrets.

static bool is_name_char(unsigned char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
           c == '-';
}

static bool is_name(const char *text, size_t length, size_t max)
{
    for (size_t i = 0; i < length; i++)
        if (!is_name_char((unsigned char)text[i]))
            return false;
    return length > 0 && length <= max;
}

int job_check_name(const char *what, const char *name, size_t max_bytes, struct err *e)
{
    if (name && is_name(name, strlen(name), max_bytes))
        return 0;
    return err_set(e, ERR_INVALID, "%s is not a name; allowed: 1 to %zu of A-Z a-z 0-9 . _ -", what, max_bytes);
}

static int check_id(const char *name, const char *text, struct err *e)
{
    return job_check_name(name, text, JOB_MAX_NAME, e);
}

static int check_model(const char *name, const char *text, struct err *e)
{
    size_t at = strcspn(text, "@");
    bool version_ok = !text[at] || is_name(text + at + 1, strlen(text + at + 1), JOB_MAX_NAME);
    if (is_name(text, at, JOB_MAX_NAME) && version_ok)
        return 0;
    return err_set(e, ERR_INVALID, "%s is not name or name@version; each is 1 to %d of A-Z a-z 0-9 . _ -", name,
                   JOB_MAX_NAME);
}

static int check_scheduler(const char *name, const char *text, struct err *e)
{
    if (strcmp(text, "FlowMatchEulerDiscreteScheduler") == 0)
        return 0;
    return err_set(e, ERR_UNSUPPORTED, "%s is not known; allowed: FlowMatchEulerDiscreteScheduler, or absent", name);
}

static const char *const placeholders[] = {"{id}", "{attempt}", "{index}"};

// The placeholder that text starts with: its index, or -1.
static int placeholder_at(const char *text)
{
    for (int i = 0; i < 3; i++)
        if (strncmp(text, placeholders[i], strlen(placeholders[i])) == 0)
            return i;
    return -1;
}

static int check_template(const char *name, const char *text, struct err *e)
{
    for (const char *p = text; *p; p++) {
        int found = *p == '{' ? placeholder_at(p) : -1;
        if (found >= 0)
            p += strlen(placeholders[found]) - 1;
        else if (*p == '{' || *p == '}')
            return err_set(e, ERR_INVALID, "%s has a brace that is no placeholder; allowed: {id}, {attempt}, {index}",
                           name);
    }
    return 0;
}

static int check_plain_url(const char *name, const char *text, struct err *e)
{
    size_t scheme = strncasecmp(text, "http://", 7) == 0 ? 7 : strncasecmp(text, "https://", 8) == 0 ? 8 : 0;
    if (!scheme)
        return err_set(e, ERR_INVALID, "%s does not start with http:// or https://", name);
    size_t authority = strcspn(text + scheme, "/?#");
    if (authority == 0 || text[scheme] == ':')
        return err_set(e, ERR_INVALID, "%s has no host", name);
    if (memchr(text + scheme, '{', authority))
        return err_set(e, ERR_INVALID, "%s has a placeholder in its host; allowed in path and query only", name);
    for (const char *p = text; *p; p++)
        if (*p <= ' ' || *p == 0x7f || (unsigned char)*p > 0x7f || strchr("\"<>\\^`|", *p))
            return err_set(e, ERR_INVALID, "%s has a character at byte %zu that must be percent-encoded", name,
                           (size_t)(p - text));
    return 0;
}

static int check_url(const char *name, const char *text, struct err *e)
{
    TRY(check_plain_url(name, text, e));
    return check_template(name, text, e);
}

static int check_callback(const char *name, const char *text, struct err *e)
{
    TRY(check_plain_url(name, text, e));
    const char *authority = strchr(text, ':') + 3;
    if (memchr(authority, '@', strcspn(authority, "/?#")))
        return err_set(e, ERR_INVALID, "%s has a user or password before its host; callbacks are signed instead", name);
    if (strpbrk(text, "{}"))
        return err_set(e, ERR_INVALID, "%s has braces; no placeholders are allowed here", name);
    return 0;
}

static int check_file(const char *name, const char *text, struct err *e)
{
    size_t length = strlen(text);
    for (const char *p = text; *p; p++)
        if ((unsigned char)*p < ' ' || *p == 0x7f)
            return err_set(e, ERR_INVALID, "%s has a control character at byte %zu", name, (size_t)(p - text));
    for (const char *p = text; *p; p += strcspn(p, "/"), p += *p == '/')
        if (strncmp(p, "..", 2) == 0 && (p[2] == '/' || p[2] == 0))
            return err_set(e, ERR_INVALID, "%s has a '..' component; give a path below an allowed root", name);
    if (text[length - 1] == '/')
        return err_set(e, ERR_INVALID, "%s ends in '/'; give a file's path", name);
    return check_template(name, text, e);
}

static int check_header_name(const char *name, const char *text, struct err *e)
{
    for (const char *p = text; *p; p++)
        if (!is_name_char((unsigned char)*p) && !strchr("!#$%&'*+^`|~", *p))
            return err_set(e, ERR_INVALID, "%s is not an HTTP token; allowed: letters, digits and !#$%%&'*+-.^_`|~",
                           name);
    return 0;
}

static int check_no_control(const char *name, const char *text, struct err *e)
{
    for (const char *p = text; *p; p++)
        if (((unsigned char)*p < ' ' && *p != '\t') || *p == 0x7f)
            return err_set(e, ERR_INVALID, "%s has a control character at byte %zu; none is allowed but tab", name,
                           (size_t)(p - text));
    return 0;
}

static int check_traceparent(const char *name, const char *text, struct err *e)
{
    static const char form[] = "hh-hhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhh-hhhhhhhhhhhhhhhh-hh";
    size_t i = 0;
    for (; form[i] && text[i]; i++)
        if (form[i] == '-' ? text[i] != '-' : !strchr("0123456789abcdef", text[i]))
            break;
    if (form[i] == 0 && text[i] == 0)
        return 0;
    return err_set(e, ERR_INVALID, "%s is not version-traceid-parentid-flags in lower-case hexadecimal (W3C)", name);
}

// ---- the table

#define NAME_FORM     "A-Z a-z 0-9 . _ -"
#define MODEL_DEFAULT "the model's default"

static const struct job_rule rules[] = {
    {.name = "id",
     .required = true,
     .max_bytes = JOB_MAX_NAME,
     .check = check_id,
     .form = NAME_FORM,
     .doc = "Chosen by the client: the idempotency key within its tenant."},
    {.name = "model",
     .required = true,
     .max_bytes = JOB_MODEL_SIZE - 1,
     .check = check_model,
     .form = "`name` or `name@version`, each at most 128 of " NAME_FORM,
     .doc = "Which model; the bare name means the version published last."},
    {.name = "prompt", .fallback = "empty", .max_bytes = JOB_MAX_PROMPT, .doc = "What to draw."},
    {.name = "prompt_2",
     .fallback = "the same as `prompt`",
     .max_bytes = JOB_MAX_PROMPT,
     .doc = "The prompt of the second text encoder (T5)."},
    {.name = "negative_prompt",
     .fallback = "no true guidance",
     .max_bytes = JOB_MAX_PROMPT,
     .doc = "What not to draw; present, even empty, with `true_cfg_scale` above 1 it turns true CFG on."},
    {.name = "negative_prompt_2",
     .fallback = "the same as `negative_prompt`",
     .max_bytes = JOB_MAX_PROMPT,
     .doc = "The negative prompt of the second text encoder."},
    {.name = "width",
     .fallback = MODEL_DEFAULT,
     .min = 16,
     .max = 16384,
     .doc = "Pixels; the model says which multiple."},
    {.name = "height",
     .fallback = MODEL_DEFAULT,
     .min = 16,
     .max = 16384,
     .doc = "Pixels; the model says which multiple."},
    {.name = "num_inference_steps", .fallback = MODEL_DEFAULT, .min = 1, .max = 1000, .doc = "Denoising steps."},
    {.name = "guidance_scale",
     .fallback = MODEL_DEFAULT,
     .min = 0,
     .max = 100,
     .doc = "Embedded (distilled) guidance, for models that have it."},
    {.name = "true_cfg_scale",
     .fallback = "1: off",
     .min = 0,
     .max = 100,
     .doc = "Classifier-free guidance; above 1 with a negative prompt it costs a second forward a step."},
    {.name = "max_sequence_length",
     .fallback = MODEL_DEFAULT,
     .min = 1,
     .max = 4096,
     .doc = "Tokens of the second text encoder; longer prompts are cut, with a warning in the result."},
    {.name = "seed", .fallback = "drawn, and told in the result", .doc = "Of the initial noise."},
    {.name = "rng", .fallback = "cpu-f32", .doc = "Which torch generator the noise equals."},
    {.name = "rng_sm_count",
     .fallback = "132",
     .min = 1,
     .max = 1024,
     .doc = "For `rng` cuda: multiprocessors of the GPU whose noise is wanted."},
    {.name = "num_images",
     .fallback = "1",
     .min = 1,
     .max = 64,
     .doc = "Pictures of one job; above 1 the output's template needs `{index}`."},
    {.name = "scheduler",
     .fallback = "the model's",
     .max_bytes = 64,
     .check = check_scheduler,
     .form = "FlowMatchEulerDiscreteScheduler",
     .doc = "Which sampler."},
    {.name = "shift",
     .fallback = "the model's schedule",
     .min = 0.01,
     .max = 100,
     .doc = "A static shift of the sigmas in place of the model's."},
    {.name = "precision",
     .fallback = "default",
     .doc = "Of weights and activations; default: the model's on that device."},
    {.name = "output", .required = true, .doc = "Where the picture goes: exactly one of `url` and `file`."},
    {.name = "output.url",
     .max_bytes = 8192,
     .check = check_url,
     .form = "http:// or https://, placeholders `{id}` `{attempt}` `{index}`",
     .doc = "Target of a PUT; which hosts are allowed is the node's configuration."},
    {.name = "output.headers", .fallback = "none", .max_items = 32, .separator = ':', .doc = "Sent with the PUT."},
    {.name = "output.headers.name",
     .required = true,
     .max_bytes = 128,
     .check = check_header_name,
     .form = "an HTTP token",
     .doc = "Name of a header."},
    {.name = "output.headers.value",
     .fallback = "empty",
     .max_bytes = 8192,
     .check = check_no_control,
     .form = "no control characters",
     .doc = "Its value: a secret, in no log, listing or event."},
    {.name = "output.file",
     .max_bytes = 1024,
     .check = check_file,
     .form = "no `..`, no control characters, placeholders `{id}` `{attempt}` `{index}`",
     .doc = "A path below a root that the node's configuration allows."},
    {.name = "callback_url",
     .fallback = "none",
     .max_bytes = 8192,
     .check = check_callback,
     .form = "http:// or https://",
     .doc = "Told when the job is final, see \"Callbacks\"."},
    {.name = "priority", .fallback = "normal", .doc = "A higher class is claimed first."},
    {.name = "deadline_ms", .fallback = "none", .doc = "Unix time in milliseconds after which the job is EXPIRED."},
    {.name = "max_attempts",
     .fallback = "the queue's `max_attempts`",
     .min = 1,
     .max = 100,
     .doc = "Attempts that may fail by the job's own retryable errors; the last of them makes it DEAD."},
    {.name = "traceparent",
     .fallback = "none",
     .max_bytes = 55,
     .check = check_traceparent,
     .form = "W3C trace context",
     .doc = "Carried to logs."},
    {.name = "labels", .fallback = "none", .max_items = 32, .separator = '=', .doc = "Echoed in the result."},
    {.name = "labels.key",
     .required = true,
     .max_bytes = 128,
     .check = check_id,
     .form = NAME_FORM,
     .doc = "Name of a label."},
    {.name = "labels.value",
     .fallback = "empty",
     .max_bytes = 1024,
     .check = check_no_control,
     .form = "no control characters",
     .doc = "Its value."},
    {.name = "not_before_ms", .fallback = "at once", .doc = "Unix time in milliseconds before which it stays DELAYED."},
};
enum { RULES = sizeof rules / sizeof *rules, PATH_SIZE = 64 };

const struct job_rule *job_rules(size_t *count)
{
    *count = RULES;
    return rules;
}

static const struct job_rule *find_rule(const char *path)
{
    for (size_t i = 0; i < RULES; i++)
        if (strcmp(rules[i].name, path) == 0)
            return &rules[i];
    return NULL;
}

static void join_path(char path[PATH_SIZE], const char *prefix, const char *name)
{
    snprintf(path, PATH_SIZE, "%s%s%s", prefix, *prefix ? "." : "", name);
}

// The descriptor of a dotted path below Job; NULL: no such field.
static const ProtobufCFieldDescriptor *find_field(const char *path)
{
    const ProtobufCMessageDescriptor *message = &ditfleet__v1__job__descriptor;
    for (;;) {
        char name[PATH_SIZE];
        size_t length = strcspn(path, ".");
        snprintf(name, sizeof name, "%.*s", (int)(length < PATH_SIZE ? length : PATH_SIZE - 1), path);
        const ProtobufCFieldDescriptor *field = protobuf_c_message_descriptor_get_field_by_name(message, name);
        if (!field || !path[length])
            return field;
        if (field->type != PROTOBUF_C_TYPE_MESSAGE)
            return NULL;
        message = field->descriptor;
        path += length + 1;
    }
}

// ---- enum names: RNG_CPU_BF16 is written cpu-bf16

// What follows the enum's own name: "RNG_CPU_F32" of enum Rng gives "cpu-f32".
static const char *enum_short_name(const ProtobufCEnumDescriptor *d, const ProtobufCEnumValue *v, char *out,
                                   size_t size)
{
    size_t skip = strlen(d->short_name) + 1, i = 0;
    for (const char *p = v->name + skip; *p && i + 1 < size; p++)
        out[i++] = *p == '_' ? '-' : *p >= 'A' && *p <= 'Z' ? (char)(*p | 0x20) : *p;
    out[i] = 0;
    return out;
}

static bool same_name(const char *a, const char *b)
{
    for (; *a && *b; a++, b++)
        if ((*a == '_' ? '-' : *a | 0x20) != (*b == '_' ? '-' : *b | 0x20))
            return false;
    return *a == *b;
}

static const ProtobufCEnumValue *enum_parse(const ProtobufCEnumDescriptor *d, const char *text)
{
    for (unsigned i = 0; i < d->n_values; i++) {
        char name[32];
        if (same_name(text, enum_short_name(d, &d->values[i], name, sizeof name)) || same_name(text, d->values[i].name))
            return &d->values[i];
    }
    return NULL;
}

static void enum_list(const ProtobufCEnumDescriptor *d, char *buffer, size_t size)
{
    size_t used = 0;
    buffer[0] = 0;
    for (unsigned i = 0; i < d->n_values && used < size; i++) {
        char name[32];
        used += (size_t)snprintf(buffer + used, size - used, "%s%s", i ? ", " : "",
                                 enum_short_name(d, &d->values[i], name, sizeof name));
    }
}

// The names as constants, since callers keep them; a test holds them equal to the descriptors.
const char *job_rng_name(Ditfleet__V1__Rng rng)
{
    static const char *const names[] = {"cpu-f32",           "cpu-bf16", "cpu-f16", "cuda", "cpu-bf16-torch-2-12",
                                        "cpu-f16-torch-2-12"};
    return (unsigned)rng < sizeof names / sizeof *names ? names[rng] : "unknown";
}

const char *job_precision_name(Ditfleet__V1__Precision precision)
{
    static const char *const names[] = {"default", "fp32", "bf16", "fp16", "fp8", "int8"};
    return (unsigned)precision < 6 ? names[precision] : "unknown";
}

const char *job_priority_name(Ditfleet__V1__Priority priority)
{
    static const char *const names[] = {"normal", "high", "low"};
    return (unsigned)priority < 3 ? names[priority] : "unknown";
}

enum { STATE_PREFIX = sizeof "STATE_" - 1 };

const char *job_state_name(Ditfleet__V1__State state)
{
    const ProtobufCEnumValue *v = protobuf_c_enum_descriptor_get_value(&ditfleet__v1__state__descriptor, (int)state);
    return v ? v->name + STATE_PREFIX : "UNKNOWN";
}

Ditfleet__V1__State job_state_parse(const char *name)
{
    const ProtobufCEnumDescriptor *d = &ditfleet__v1__state__descriptor;
    for (unsigned i = 0; i < d->n_values; i++)
        if (strcmp(d->values[i].name + STATE_PREFIX, name) == 0)
            return (Ditfleet__V1__State)d->values[i].value;
    return DITFLEET__V1__STATE__STATE_UNKNOWN;
}

bool job_state_final(Ditfleet__V1__State state)
{
    return state >= DITFLEET__V1__STATE__STATE_SUCCEEDED && state <= DITFLEET__V1__STATE__STATE_EXPIRED;
}

// ---- the table in words

const char *job_rule_type(const struct job_rule *rule, char *buffer, size_t size)
{
    const ProtobufCFieldDescriptor *f = find_field(rule->name);
    const char *repeated = f->label == PROTOBUF_C_LABEL_REPEATED ? "repeated " : "", *type = "uint32";
    if (f->type == PROTOBUF_C_TYPE_MESSAGE)
        type = ((const ProtobufCMessageDescriptor *)f->descriptor)->short_name;
    else if (f->type == PROTOBUF_C_TYPE_ENUM)
        type = ((const ProtobufCEnumDescriptor *)f->descriptor)->short_name;
    else if (f->type == PROTOBUF_C_TYPE_STRING)
        type = "string";
    else if (f->type == PROTOBUF_C_TYPE_FLOAT)
        type = "float";
    else if (f->type == PROTOBUF_C_TYPE_UINT64)
        type = "uint64";
    snprintf(buffer, size, "%s%s", repeated, type);
    return buffer;
}

const char *job_rule_allowed(const struct job_rule *rule, char *buffer, size_t size)
{
    const ProtobufCFieldDescriptor *f = find_field(rule->name);
    if (f->type == PROTOBUF_C_TYPE_ENUM)
        enum_list(f->descriptor, buffer, size);
    else if (f->label == PROTOBUF_C_LABEL_REPEATED)
        snprintf(buffer, size, "at most %zu", rule->max_items);
    else if (f->type == PROTOBUF_C_TYPE_STRING)
        snprintf(buffer, size, "at most %zu bytes%s%s", rule->max_bytes, rule->form ? ": " : " of UTF-8",
                 rule->form ? rule->form : "");
    else if (rule->min < rule->max)
        snprintf(buffer, size, "%g to %g", rule->min, rule->max);
    else
        snprintf(buffer, size, "%s", f->type == PROTOBUF_C_TYPE_MESSAGE ? "" : "any");
    return buffer;
}

void job_print_table(FILE *out)
{
    fprintf(out, "| field | no. | type | allowed | absent | meaning |\n|---|---|---|---|---|---|\n");
    for (size_t i = 0; i < RULES; i++) {
        const struct job_rule *r = &rules[i];
        char type[32], allowed[256];
        fprintf(out, "| `%s` | %u | %s | %s | %s | %s |\n", r->name, find_field(r->name)->id,
                job_rule_type(r, type, sizeof type), job_rule_allowed(r, allowed, sizeof allowed),
                r->required   ? "refused"
                : r->fallback ? r->fallback
                              : "",
                r->doc);
    }
}

// ---- scan: the bytes against the descriptors, before protobuf-c sees them

struct cursor {
    const unsigned char *at, *end;
};

static bool read_varint(struct cursor *c, uint64_t *value)
{
    *value = 0;
    for (unsigned shift = 0; shift < 64 && c->at < c->end; shift += 7) {
        unsigned char byte = *c->at++;
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80))
            return true;
    }
    return false;
}

static unsigned wire_type(const ProtobufCFieldDescriptor *f)
{
    switch (f->type) {
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_BYTES:
    case PROTOBUF_C_TYPE_MESSAGE:
        return PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED;
    case PROTOBUF_C_TYPE_FLOAT:
    case PROTOBUF_C_TYPE_FIXED32:
    case PROTOBUF_C_TYPE_SFIXED32:
        return PROTOBUF_C_WIRE_TYPE_32BIT;
    case PROTOBUF_C_TYPE_DOUBLE:
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_SFIXED64:
        return PROTOBUF_C_WIRE_TYPE_64BIT;
    default:
        return PROTOBUF_C_WIRE_TYPE_VARINT;
    }
}

static int truncated(const char *path, struct err *e)
{
    return err_set(e, ERR_CORRUPT, "not a serialised Job: the bytes end inside %s", *path ? path : "a field's tag");
}

static int scan(const ProtobufCMessageDescriptor *d, const char *prefix, struct cursor c, char *id, struct err *e);

static int scan_bytes(const ProtobufCFieldDescriptor *f, const char *path, struct cursor value, char *id, struct err *e)
{
    size_t length = (size_t)(value.end - value.at);
    const struct job_rule *rule = find_rule(path);
    if (f->type == PROTOBUF_C_TYPE_MESSAGE)
        return scan(f->descriptor, path, value, NULL, e);
    if (rule && length > rule->max_bytes)
        return err_set(e, ERR_INVALID, "%s has %zu bytes; allowed: at most %zu", path, length, rule->max_bytes);
    if (length && memchr(value.at, 0, length))
        return err_set(e, ERR_INVALID, "%s contains a zero byte; allowed: UTF-8 text without it", path);
    if (id && strcmp(path, "id") == 0 && is_name((const char *)value.at, length, JOB_MAX_NAME))
        snprintf(id, JOB_NAME_SIZE, "%.*s", (int)length, (const char *)value.at);
    return 0;
}

static int scan_value(const ProtobufCFieldDescriptor *f, const char *path, struct cursor *c, char *id, struct err *e)
{
    uint64_t n;
    switch (wire_type(f)) {
    case PROTOBUF_C_WIRE_TYPE_VARINT:
        return read_varint(c, &n) ? 0 : truncated(path, e);
    case PROTOBUF_C_WIRE_TYPE_32BIT:
        n = 4;
        break;
    case PROTOBUF_C_WIRE_TYPE_64BIT:
        n = 8;
        break;
    default:
        if (!read_varint(c, &n))
            return truncated(path, e);
        break;
    }
    if (n > (size_t)(c->end - c->at))
        return truncated(path, e);
    struct cursor value = {c->at, c->at + n};
    c->at += n;
    return wire_type(f) == PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED ? scan_bytes(f, path, value, id, e) : 0;
}

static int scan(const ProtobufCMessageDescriptor *d, const char *prefix, struct cursor c, char *id, struct err *e)
{
    uint64_t seen = 0;
    const char *of = *prefix ? prefix : "Job";
    while (c.at < c.end) {
        uint64_t tag;
        char path[PATH_SIZE];
        if (!read_varint(&c, &tag))
            return truncated(prefix, e);
        unsigned type = tag & 7;
        if (tag >> 3 == 0 || tag >> 3 > 0x1fffffff || type == 3 || type == 4 || type > 5)
            return err_set(e, ERR_CORRUPT, "not a serialised Job: a tag in %s has no valid number and type", of);
        const ProtobufCFieldDescriptor *f = protobuf_c_message_descriptor_get_field(d, (unsigned)(tag >> 3));
        if (!f)
            return err_set(
                e, ERR_UNSUPPORTED,
                "%s has field number %u, which this version does not know; leave it out or upgrade the fleet", of,
                (unsigned)(tag >> 3));
        join_path(path, prefix, f->name);
        if (type != wire_type(f))
            return err_set(e, ERR_CORRUPT, "not a serialised Job: %s has wire type %u; allowed: %u", path, type,
                           wire_type(f));
        uint64_t bit = (uint64_t)1 << ((size_t)(f - d->fields) & 63);
        if (f->label != PROTOBUF_C_LABEL_REPEATED && (seen & bit))
            return err_set(e, ERR_INVALID, "%s occurs twice; allowed: once", path);
        seen |= bit;
        TRY(scan_value(f, path, &c, id, e));
    }
    return 0;
}

// ---- validation of an unpacked message

static int check_utf8(const char *path, const char *text, struct err *e)
{
    utf8proc_int32_t codepoint;
    size_t length = strlen(text);
    for (size_t at = 0; at < length;) {
        utf8proc_ssize_t n =
            utf8proc_iterate((const utf8proc_uint8_t *)text + at, (utf8proc_ssize_t)(length - at), &codepoint);
        if (n <= 0)
            return err_set(e, ERR_INVALID, "%s is not UTF-8 at byte %zu", path, at);
        at += (size_t)n;
    }
    return 0;
}

static int check_text(const struct job_rule *rule, const char *path, const char *text, struct err *e)
{
    if (rule && strlen(text) > rule->max_bytes)
        return err_set(e, ERR_INVALID, "%s has %zu bytes; allowed: at most %zu", path, strlen(text), rule->max_bytes);
    TRY(check_utf8(path, text, e));
    return rule && rule->check && *text ? rule->check(path, text, e) : 0;
}

static int check_number(const struct job_rule *rule, const char *path, double value, struct err *e)
{
    if (rule && rule->min < rule->max && !(value >= rule->min && value <= rule->max))
        return err_set(e, ERR_INVALID, "%s is %g; allowed: %g to %g", path, value, rule->min, rule->max);
    return 0;
}

static int check_enum(const ProtobufCFieldDescriptor *f, const char *path, int value, struct err *e)
{
    if (protobuf_c_enum_descriptor_get_value(f->descriptor, value))
        return 0;
    char names[128];
    enum_list(f->descriptor, names, sizeof names);
    return err_set(e, ERR_INVALID, "%s is the number %d; allowed: %s", path, value, names);
}

static double number_at(const ProtobufCFieldDescriptor *f, const void *at)
{
    switch (f->type) {
    case PROTOBUF_C_TYPE_FLOAT:
        return *(const float *)at;
    case PROTOBUF_C_TYPE_DOUBLE:
        return *(const double *)at;
    case PROTOBUF_C_TYPE_UINT64:
        return (double)*(const uint64_t *)at;
    case PROTOBUF_C_TYPE_BOOL:
        return *(const protobuf_c_boolean *)at;
    default:
        return *(const uint32_t *)at;
    }
}

enum { REQUIRE = 1, UTF8_ONLY = 2 }; // flags of validate

static int validate(const ProtobufCMessage *m, const char *prefix, int flags, struct err *e);

// One value of f (an item of a repeated field, or the field itself) that is present at `at`.
static int validate_value(const ProtobufCFieldDescriptor *f, const char *path, const void *at, int flags, struct err *e)
{
    const struct job_rule *rule = flags & UTF8_ONLY ? NULL : find_rule(path);
    if (f->type == PROTOBUF_C_TYPE_MESSAGE)
        return validate(*(ProtobufCMessage *const *)at, path, flags, e);
    if (f->type == PROTOBUF_C_TYPE_STRING)
        return check_text(rule, path, *(char *const *)at, e);
    if (f->type == PROTOBUF_C_TYPE_ENUM)
        return flags & UTF8_ONLY ? 0 : check_enum(f, path, *(const int *)at, e);
    return check_number(rule, path, number_at(f, at), e);
}

static bool present(const ProtobufCFieldDescriptor *f, const ProtobufCMessage *m)
{
    const char *base = (const char *)m, *at = base + f->offset;
    if (f->flags & PROTOBUF_C_FIELD_FLAG_ONEOF)
        return *(const uint32_t *)(base + f->quantifier_offset) == f->id;
    if (f->type == PROTOBUF_C_TYPE_MESSAGE)
        return *(void *const *)at != NULL;
    if (f->type == PROTOBUF_C_TYPE_STRING)
        return *(char *const *)at && **(char *const *)at;
    if (f->type == PROTOBUF_C_TYPE_ENUM)
        return *(const int *)at != 0;
    return number_at(f, at) != 0;
}

static int validate_repeated(const ProtobufCFieldDescriptor *f, const char *path, const ProtobufCMessage *m, int flags,
                             struct err *e)
{
    const struct job_rule *rule = flags & UTF8_ONLY ? NULL : find_rule(path);
    size_t count = *(const size_t *)((const char *)m + f->quantifier_offset);
    void *const *items = *(void *const *const *)((const char *)m + f->offset);
    if (rule && count > rule->max_items)
        return err_set(e, ERR_INVALID, "%s has %zu items; allowed: at most %zu", path, count, rule->max_items);
    for (size_t i = 0; i < count; i++)
        TRY(validate_value(f, path, &items[i], flags, e));
    return 0;
}

static int validate(const ProtobufCMessage *m, const char *prefix, int flags, struct err *e)
{
    for (unsigned i = 0; i < m->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *f = &m->descriptor->fields[i];
        char path[PATH_SIZE];
        join_path(path, prefix, f->name);
        const struct job_rule *rule = find_rule(path);
        if (f->label == PROTOBUF_C_LABEL_REPEATED)
            TRY(validate_repeated(f, path, m, flags, e));
        else if (present(f, m))
            TRY(validate_value(f, path, (const char *)m + f->offset, flags, e));
        else if (!(flags & UTF8_ONLY) && rule && rule->required && (flags & REQUIRE || *prefix))
            return err_set(e, ERR_INVALID, "%s is missing", path);
    }
    return 0;
}

// What one field alone cannot show.
static int check_together(const Ditfleet__V1__Job *job, struct err *e)
{
    const Ditfleet__V1__Output *o = job->output;
    if (o && (*o->url != 0) == (*o->file != 0))
        return err_set(e, ERR_INVALID, "output has %s of url and file; allowed: exactly one",
                       *o->url ? "both" : "none");
    if (o && *o->file && o->n_headers)
        return err_set(e, ERR_INVALID, "output.headers go with output.url, not with output.file");
    if (o && job->num_images > 1 && !strstr(*o->url ? o->url : o->file, "{index}"))
        return err_set(e, ERR_INVALID, "output.%s needs {index}, since num_images is %u", *o->url ? "url" : "file",
                       job->num_images);
    if (job->deadline_ms && job->not_before_ms >= job->deadline_ms)
        return err_set(e, ERR_INVALID, "not_before_ms is not before deadline_ms");
    size_t size = ditfleet__v1__job__get_packed_size(job);
    if (size > JOB_MAX_BYTES)
        return err_set(e, ERR_INVALID, "the job has %zu bytes; allowed: at most %d", size, JOB_MAX_BYTES);
    return 0;
}

int job_validate(const Ditfleet__V1__Job *job, struct err *e)
{
    TRY(validate(&job->base, "", REQUIRE, e));
    return check_together(job, e);
}

int job_check_fields(const Ditfleet__V1__Job *job, struct err *e)
{
    TRY(validate(&job->base, "", 0, e));
    return check_together(job, e);
}

int job_parse(const void *bytes, size_t length, Ditfleet__V1__Job **job, char *id, struct err *e)
{
    *job = NULL;
    if (id)
        *id = 0;
    if (length == 0)
        return err_set(e, ERR_CORRUPT, "not a serialised Job: no bytes");
    // The scan comes before the bound of the whole, so that the field that is too long is named.
    const unsigned char *start = bytes;
    TRY(scan(&ditfleet__v1__job__descriptor, "", (struct cursor){start, start + length}, id, e));
    if (length > JOB_MAX_BYTES)
        return err_set(e, ERR_INVALID, "the job has %zu bytes; allowed: at most %d", length, JOB_MAX_BYTES);
    Ditfleet__V1__Job *parsed = ditfleet__v1__job__unpack(NULL, length, bytes);
    if (!parsed)
        return err_set(e, ERR_CORRUPT, "not a serialised Job of proto/job.proto");
    int rc = job_validate(parsed, e);
    if (rc != 0) {
        job_free(parsed);
        return rc;
    }
    *job = parsed;
    return 0;
}

// ---- building a job field by field

Ditfleet__V1__Job *job_new(void)
{
    Ditfleet__V1__Job *job = malloc(sizeof *job);
    if (job)
        ditfleet__v1__job__init(job);
    return job;
}

void job_free(Ditfleet__V1__Job *job)
{
    if (job)
        ditfleet__v1__job__free_unpacked(job, NULL);
}

static int no_memory(struct err *e)
{
    return err_set(e, ERR_NO_MEMORY, "out of memory for a message");
}

static int set_string(ProtobufCMessage *m, const ProtobufCFieldDescriptor *f, const char *text, struct err *e)
{
    char **at = (char **)((char *)m + f->offset), *copy = strdup(text);
    bool in_oneof = f->flags & PROTOBUF_C_FIELD_FLAG_ONEOF;
    if (!copy)
        return no_memory(e);
    if (*at && *at != protobuf_c_empty_string && (!in_oneof || present(f, m)))
        free(*at);
    *at = copy;
    return 0;
}

static int not_a(const char *path, const char *what, struct err *e)
{
    char allowed[256] = "";
    const struct job_rule *rule = find_rule(path);
    if (rule)
        job_rule_allowed(rule, allowed, sizeof allowed);
    return err_set(e, ERR_INVALID, "%s is not %s; allowed: %s", path, what, allowed);
}

static int set_number(ProtobufCMessage *m, const ProtobufCFieldDescriptor *f, const char *path, const char *text,
                      struct err *e)
{
    void *at = (char *)m + f->offset;
    char *end;
    if (f->type == PROTOBUF_C_TYPE_FLOAT) {
        float value = strtof(text, &end);
        if (end == text || *end)
            return not_a(path, "a number", e);
        TRY(check_number(find_rule(path), path, value, e));
        memcpy(at, &value, sizeof value);
        return 0;
    }
    uint64_t value = 0, max = f->type == PROTOBUF_C_TYPE_UINT64 ? UINT64_MAX : UINT32_MAX;
    const char *p = text;
    for (; *p >= '0' && *p <= '9'; p++) {
        if (value > (max - (uint64_t)(*p - '0')) / 10)
            return not_a(path, "within its type", e);
        value = value * 10 + (uint64_t)(*p - '0');
    }
    if (p == text || *p)
        return not_a(path, "a whole number", e);
    TRY(check_number(find_rule(path), path, (double)value, e));
    uint32_t narrow = (uint32_t)value;
    if (f->type == PROTOBUF_C_TYPE_UINT64)
        memcpy(at, &value, sizeof value);
    else
        memcpy(at, &narrow, sizeof narrow);
    return 0;
}

static int set_leaf(ProtobufCMessage *m, const ProtobufCFieldDescriptor *f, const char *path, const char *text,
                    struct err *e)
{
    if (f->type == PROTOBUF_C_TYPE_STRING) {
        TRY(check_text(find_rule(path), path, text, e));
        TRY(set_string(m, f, text, e));
    } else if (f->type == PROTOBUF_C_TYPE_ENUM) {
        const ProtobufCEnumValue *v = enum_parse(f->descriptor, text);
        if (!v)
            return not_a(path, "a known value", e);
        memcpy((char *)m + f->offset, &v->value, sizeof v->value);
    } else {
        TRY(set_number(m, f, path, text, e));
    }
    if (f->flags & PROTOBUF_C_FIELD_FLAG_ONEOF)
        memcpy((char *)m + f->quantifier_offset, &f->id, sizeof f->id);
    return 0;
}

static ProtobufCMessage *new_message(const ProtobufCMessageDescriptor *d)
{
    ProtobufCMessage *m = malloc(d->sizeof_message);
    if (m)
        protobuf_c_message_init(d, m);
    return m;
}

// Appends an item of two strings, given as "key<separator>value".
static int append_pair(ProtobufCMessage *m, const ProtobufCFieldDescriptor *f, const char *path, const char *text,
                       struct err *e)
{
    const struct job_rule *rule = find_rule(path);
    const ProtobufCMessageDescriptor *d = f->descriptor;
    size_t *count = (size_t *)((char *)m + f->quantifier_offset);
    ProtobufCMessage ***items = (ProtobufCMessage ***)((char *)m + f->offset);
    const char *separator = strchr(text, rule->separator), *value = separator ? separator + 1 : NULL;
    if (!separator || separator == text)
        return err_set(e, ERR_INVALID, "%s takes name%cvalue", path, rule->separator);
    if (*count >= rule->max_items)
        return err_set(e, ERR_INVALID, "%s has more than %zu items", path, rule->max_items);
    while (rule->separator == ':' && *value == ' ')
        value++;
    char *key = strndup(text, (size_t)(separator - text)), name[PATH_SIZE];
    ProtobufCMessage *item = new_message(d), **grown = realloc(*items, (*count + 1) * sizeof(void *));
    if (grown)
        *items = grown;
    if (!key || !grown || !item) {
        free(key);
        free(item);
        return no_memory(e);
    }
    join_path(name, path, d->fields[0].name);
    int rc = set_leaf(item, &d->fields[0], name, key, e);
    join_path(name, path, d->fields[1].name);
    rc = rc ? rc : set_leaf(item, &d->fields[1], name, value, e);
    if (rc == 0)
        grown[(*count)++] = item;
    else
        protobuf_c_message_free_unpacked(item, NULL);
    free(key);
    return rc;
}

int job_set_field(Ditfleet__V1__Job *job, const char *name, const char *text, struct err *e)
{
    char path[PATH_SIZE / 2];
    snprintf(path, sizeof path, "%s", name);
    for (char *p = path; *p; p++)
        if (*p == '-')
            *p = '_';
    const ProtobufCFieldDescriptor *f = strlen(name) < sizeof path ? find_field(path) : NULL;
    ProtobufCMessage *m = &job->base;
    bool pair = f && f->label == PROTOBUF_C_LABEL_REPEATED;
    if (!f || (f->type == PROTOBUF_C_TYPE_MESSAGE && !pair) || strncmp(path, "labels.", 7) == 0 ||
        strncmp(path, "output.headers.", 15) == 0)
        return err_set(e, ERR_INVALID, "a job has no field %.40s that can be set from text", name);
    if (strncmp(path, "output.", 7) == 0) {
        if (!job->output)
            job->output = (Ditfleet__V1__Output *)new_message(&ditfleet__v1__output__descriptor);
        if (!job->output)
            return no_memory(e);
        m = &job->output->base;
    }
    return pair ? append_pair(m, f, path, text, e) : set_leaf(m, f, path, text, e);
}

// ---- packing

static int pack(const ProtobufCMessage *m, void **bytes, size_t *length, struct err *e)
{
    *length = protobuf_c_message_get_packed_size(m);
    *bytes = malloc(*length + 1);
    if (!*bytes)
        return no_memory(e);
    protobuf_c_message_pack(m, *bytes);
    return 0;
}

int job_pack(const Ditfleet__V1__Job *job, void **bytes, size_t *length, struct err *e)
{
    return pack(&job->base, bytes, length, e);
}

int result_pack(const Ditfleet__V1__Result *result, void **bytes, size_t *length, struct err *e)
{
    return pack(&result->base, bytes, length, e);
}

int event_pack(const Ditfleet__V1__Event *event, void **bytes, size_t *length, struct err *e)
{
    return pack(&event->base, bytes, length, e);
}

Ditfleet__V1__Job *job_copy(const Ditfleet__V1__Job *job)
{
    void *bytes;
    size_t length;
    if (job_pack(job, &bytes, &length, NULL) != 0)
        return NULL;
    Ditfleet__V1__Job *copy = ditfleet__v1__job__unpack(NULL, length, bytes);
    free(bytes);
    return copy;
}

static int unpack(const ProtobufCMessageDescriptor *d, const void *bytes, size_t length, ProtobufCMessage **m,
                  struct err *e)
{
    *m = protobuf_c_message_unpack(d, NULL, length, bytes);
    if (!*m)
        return err_set(e, ERR_CORRUPT, "%zu bytes are not a serialised %s", length, d->short_name);
    int rc = validate(*m, d->short_name, UTF8_ONLY, e);
    if (rc != 0) {
        protobuf_c_message_free_unpacked(*m, NULL);
        *m = NULL;
    }
    return rc;
}

int result_unpack(const void *bytes, size_t length, Ditfleet__V1__Result **result, struct err *e)
{
    return unpack(&ditfleet__v1__result__descriptor, bytes, length, (ProtobufCMessage **)result, e);
}

int event_unpack(const void *bytes, size_t length, Ditfleet__V1__Event **event, struct err *e)
{
    return unpack(&ditfleet__v1__event__descriptor, bytes, length, (ProtobufCMessage **)event, e);
}

void result_free(Ditfleet__V1__Result *result)
{
    if (result)
        ditfleet__v1__result__free_unpacked(result, NULL);
}

void event_free(Ditfleet__V1__Event *event)
{
    if (event)
        ditfleet__v1__event__free_unpacked(event, NULL);
}

int result_pack_error(const char *id, Ditfleet__V1__State state, const struct err *why, void **bytes, size_t *length,
                      struct err *e)
{
    Ditfleet__V1__Result result = DITFLEET__V1__RESULT__INIT;
    Ditfleet__V1__Error error = DITFLEET__V1__ERROR__INIT;
    char code[32], message[sizeof why->text], name[JOB_NAME_SIZE];
    snprintf(code, sizeof code, "%s", err_name(why->code));
    snprintf(message, sizeof message, "%s", why->text);
    for (char *p = message; *p; p++) // text of system calls may be cut inside a character; the field must be UTF-8
        if ((unsigned char)*p > 0x7f)
            *p = '?';
    snprintf(name, sizeof name, "%s", id);
    error.code = code;
    error.message = message;
    error.retryable = why->retryable;
    result.id = name;
    result.state = state;
    result.error = &error;
    return result_pack(&result, bytes, length, e);
}

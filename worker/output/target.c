#include "worker/output/target.h"

#include <arpa/inet.h>
#include <curl/curl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- addresses

// Not globally routable unicast: IANA's IPv4 special-purpose registry, multicast and the reserved top.
static const struct {
    uint8_t net[4];
    int bits;
} closed4[] = {
    {{0, 0, 0, 0}, 8},                               // this network
    {{10, 0, 0, 0}, 8},                              // private
    {{100, 64, 0, 0}, 10},                           // carrier-grade NAT
    {{127, 0, 0, 0}, 8},                             // loopback
    {{169, 254, 0, 0}, 16},                          // link-local; cloud metadata
    {{172, 16, 0, 0}, 12},                           // private
    {{192, 0, 0, 0}, 24},                            // IETF protocol assignments
    {{192, 0, 2, 0}, 24},                            // documentation
    {{192, 88, 99, 0}, 24},                          // 6to4 relays
    {{192, 168, 0, 0}, 16},                          // private
    {{198, 18, 0, 0}, 15},                           // benchmarking
    {{198, 51, 100, 0}, 24}, {{203, 0, 113, 0}, 24}, // documentation
    {{224, 0, 0, 0}, 4},                             // multicast
    {{240, 0, 0, 0}, 4},                             // reserved, broadcast
};

// Within 2000::/3, the only range that holds global unicast: mapped, NAT64, unique local, link-local, multicast,
// loopback and unspecified addresses all lie outside it.
static const struct {
    uint8_t net[4];
    int bits;
} closed6[] = {
    {{0x20, 0x01, 0x00, 0x00}, 23}, // IETF protocol assignments: Teredo, ORCHID, benchmarking
    {{0x20, 0x01, 0x0d, 0xb8}, 32}, // documentation
    {{0x20, 0x02, 0x00, 0x00}, 16}, // 6to4
    {{0x3f, 0xff, 0x00, 0x00}, 20}, // documentation
};

static bool in_net(const uint8_t *address, const uint8_t net[4], int bits)
{
    uint32_t a, n;
    memcpy(&a, address, 4);
    memcpy(&n, net, 4);
    return ((ntohl(a) ^ ntohl(n)) >> (32 - bits)) == 0;
}

bool target_address_public(const struct sockaddr *address)
{
    if (address->sa_family == AF_INET) {
        struct sockaddr_in in;
        memcpy(&in, address, sizeof in);
        for (size_t i = 0; i < sizeof closed4 / sizeof *closed4; i++)
            if (in_net((const uint8_t *)&in.sin_addr, closed4[i].net, closed4[i].bits))
                return false;
        return true;
    }
    if (address->sa_family != AF_INET6)
        return false;
    struct sockaddr_in6 in6;
    memcpy(&in6, address, sizeof in6);
    const uint8_t *a = in6.sin6_addr.s6_addr;
    for (size_t i = 0; i < sizeof closed6 / sizeof *closed6; i++)
        if (in_net(a, closed6[i].net, closed6[i].bits))
            return false;
    return (a[0] & 0xe0) == 0x20;
}

// host as curl's parser gives it: an IPv4 address in any spelling is dotted decimal by now, IPv6 is in brackets.
static bool host_is_closed_literal(const char *host)
{
    struct sockaddr_in in = {.sin_family = AF_INET};
    struct sockaddr_in6 in6 = {.sin6_family = AF_INET6};
    if (inet_pton(AF_INET, host, &in.sin_addr) == 1)
        return !target_address_public((struct sockaddr *)&in);
    char bare[INET6_ADDRSTRLEN];
    size_t n = strlen(host);
    if (n < 3 || n - 2 >= sizeof bare || host[0] != '[')
        return false;
    memcpy(bare, host + 1, n - 2);
    bare[n - 2] = 0;
    return inet_pton(AF_INET6, bare, &in6.sin6_addr) == 1 && !target_address_public((struct sockaddr *)&in6);
}

// ---- URLs

struct parts {
    CURLU *url;
    char *scheme, *host, *port, *path;
};

static void parts_free(struct parts *p)
{
    curl_free(p->scheme);
    curl_free(p->host);
    curl_free(p->port);
    curl_free(p->path);
    curl_url_cleanup(p->url);
}

static CURLUcode parse(const char *text, unsigned flags, struct parts *p)
{
    p->url = curl_url();
    if (!p->url)
        return CURLUE_OUT_OF_MEMORY;
    CURLUcode code = curl_url_set(p->url, CURLUPART_URL, text, flags | CURLU_NON_SUPPORT_SCHEME | CURLU_PATH_AS_IS);
    if (!code)
        code = curl_url_get(p->url, CURLUPART_SCHEME, &p->scheme, 0);
    if (!code)
        code = curl_url_get(p->url, CURLUPART_HOST, &p->host, 0);
    if (!code)
        code = curl_url_get(p->url, CURLUPART_PORT, &p->port, CURLU_DEFAULT_PORT);
    if (!code)
        code = curl_url_get(p->url, CURLUPART_PATH, &p->path, 0);
    return code;
}

static bool same_place(const struct parts *p, const char *entry)
{
    char text[512];
    struct parts q __attribute__((cleanup(parts_free))) = {0};
    int n = snprintf(text, sizeof text, "%s://%s/", p->scheme, entry);
    return n > 0 && (size_t)n < sizeof text && parse(text, 0, &q) == CURLUE_OK && strcasecmp(p->host, q.host) == 0 &&
           strcmp(p->port, q.port) == 0;
}

static bool on_allow_list(const struct upload_policy *policy, const struct parts *p)
{
    for (size_t i = 0; i < policy->n_allow_hosts; i++)
        if (same_place(p, policy->allow_hosts[i]))
            return true;
    return false;
}

int target_check_url(const struct upload_policy *policy, const char *url, bool *allow_private, struct err *e)
{
    const char *what = policy->what ? policy->what : "upload";
    for (const char *c = url; *c; c++)
        if (*c <= 0x20 || *c >= 0x7f || strchr("\"\\<>", *c))
            return err_set(e, ERR_INVALID,
                           "%s URL: byte %zu is a space, quote, bracket, backslash, control or non-ASCII character; "
                           "percent-encode it",
                           what, (size_t)(c - url));
    struct parts p __attribute__((cleanup(parts_free))) = {0};
    CURLUcode code = parse(url, CURLU_DISALLOW_USER, &p);
    if (p.scheme && strcmp(p.scheme, "http") != 0 && strcmp(p.scheme, "https") != 0)
        return err_set(e, ERR_REFUSED, "%s URL: scheme %.20s is not allowed; use https or http", what, p.scheme);
    if (code == CURLUE_USER_NOT_ALLOWED)
        return err_set(e, ERR_REFUSED, "%s URL: user and password are not allowed there%s", what,
                       policy->what ? "" : "; send a header");
    if (code)
        return err_set(e, ERR_INVALID, "%s URL: %s; write http(s)://host[:port]/path", what, curl_url_strerror(code));
    if (strcmp(p.port, "0") == 0)
        return err_set(e, ERR_INVALID, "%s URL: port 0; write 1 to 65535", what);
    bool allowed = on_allow_list(policy, &p);
    if (allow_private)
        *allow_private = allowed;
    if (!allowed && host_is_closed_literal(p.host))
        return err_set(e, ERR_REFUSED,
                       "%s URL: address %.64s is loopback, private or reserved, and the node's configuration does "
                       "not allow %.64s:%s",
                       what, p.host, p.host, p.port);
    return 0;
}

int target_copy_hosts(struct upload_policy *policy, const char *const *hosts, size_t n, struct err *e)
{
    char **copy = calloc(n + 1, sizeof *copy);
    policy->allow_hosts = (const char *const *)copy;
    policy->n_allow_hosts = 0;
    for (size_t i = 0; copy && i < n; i++) {
        copy[i] = strdup(hosts[i]);
        if (!copy[i])
            return err_set(e, ERR_NO_MEMORY, "no memory for the list of allowed hosts");
        policy->n_allow_hosts++;
    }
    return copy ? 0 : err_set(e, ERR_NO_MEMORY, "no memory for the list of allowed hosts");
}

void target_free_hosts(struct upload_policy *policy)
{
    for (size_t i = 0; i < policy->n_allow_hosts; i++)
        free((void *)policy->allow_hosts[i]);
    free((void *)policy->allow_hosts);
    policy->allow_hosts = NULL;
    policy->n_allow_hosts = 0;
}

int target_check_policy(const struct upload_policy *policy, struct err *e)
{
    for (size_t i = 0; i < policy->n_allow_hosts; i++) {
        const char *entry = policy->allow_hosts[i];
        char text[512];
        struct parts p __attribute__((cleanup(parts_free))) = {0};
        char *explicit_port = NULL;
        snprintf(text, sizeof text, "http://%.480s/", entry);
        bool good = strlen(entry) <= 480 && !strpbrk(entry, "/@?#\\ ") && parse(text, CURLU_DISALLOW_USER, &p) == 0 &&
                    curl_url_get(p.url, CURLUPART_PORT, &explicit_port, 0) == 0 && strcmp(explicit_port, "0") != 0;
        curl_free(explicit_port);
        if (!good)
            return err_set(e, ERR_INVALID, "allowed %s host \"%.100s\": write host:port, for example minio.local:9000",
                           policy->what ? policy->what : "upload", entry);
    }
    for (size_t i = 0; i < policy->n_file_roots; i++)
        if (policy->file_roots[i][0] != '/')
            return err_set(e, ERR_INVALID, "file root \"%.200s\": write an absolute directory", policy->file_roots[i]);
    return 0;
}

void target_redact(const char *url, char *out, size_t room)
{
    static const CURLUPart secret[] = {CURLUPART_QUERY, CURLUPART_FRAGMENT, CURLUPART_USER, CURLUPART_PASSWORD,
                                       CURLUPART_OPTIONS};
    struct parts p __attribute__((cleanup(parts_free))) = {0};
    CURLUcode code = parse(url, 0, &p);
    for (size_t i = 0; !code && i < sizeof secret / sizeof *secret; i++)
        code = curl_url_set(p.url, secret[i], NULL, 0);
    char *text = NULL;
    if (!code)
        code = curl_url_get(p.url, CURLUPART_URL, &text, 0);
    snprintf(out, room, "%s", code ? "(malformed URL)" : text);
    curl_free(text);
}

// ---- files

int target_check_file(const struct upload_policy *policy, const char *path, const char **root, const char **rest,
                      struct err *e)
{
    for (const char *p = path; *p; p++)
        if (strncmp(p, "/../", 4) == 0 || strcmp(p, "/..") == 0)
            return err_set(e, ERR_REFUSED, "file path %.200s: .. is not allowed", path);
    for (size_t i = 0; i < policy->n_file_roots; i++) {
        const char *r = policy->file_roots[i];
        size_t n = strlen(r);
        while (n > 0 && r[n - 1] == '/')
            n--;
        if (strncmp(path, r, n) == 0 && path[n] == '/' && path[n + 1]) {
            *root = r;
            *rest = path + n + 1;
            return 0;
        }
    }
    return err_set(e, ERR_REFUSED, "file path %.200s is not below a file root of the node's configuration (%s%.100s)",
                   path, policy->n_file_roots ? "the first: " : "none is set",
                   policy->n_file_roots ? policy->file_roots[0] : "");
}

// ---- templates

static void put_escaped(FILE *f, const char *s)
{
    for (; *s; s++)
        if ((*s >= '0' && *s <= '9') || (*s >= 'a' && *s <= 'z') || (*s >= 'A' && *s <= 'Z') || strchr("-._~", *s))
            fputc(*s, f);
        else
            fprintf(f, "%%%02X", (unsigned char)*s);
}

static int expand_into(FILE *f, const char *template, const char *id, uint32_t attempt, uint32_t index, struct err *e)
{
    for (const char *p = template; *p; p++) {
        if (*p != '{' && *p != '}') {
            fputc(*p, f);
            continue;
        }
        size_t n = strcspn(p, "}") + 1;
        if (strncmp(p, "{id}", 4) == 0)
            put_escaped(f, id);
        else if (strncmp(p, "{attempt}", n) == 0 && n == 9)
            fprintf(f, "%u", attempt);
        else if (strncmp(p, "{index}", n) == 0 && n == 7)
            fprintf(f, "%u", index);
        else
            return err_set(e, ERR_INVALID,
                           "output: unknown placeholder at byte %zu; allowed are {id}, {attempt} and {index}",
                           (size_t)(p - template));
        p += n - 1;
    }
    return 0;
}

int target_expand(const char *template, const char *id, uint32_t attempt, uint32_t index, char **out, struct err *e)
{
    size_t len;
    *out = NULL;
    FILE *f = open_memstream(out, &len);
    if (!f)
        return err_set(e, ERR_NO_MEMORY, "no memory for an output target");
    int code = expand_into(f, template, id, attempt, index, e);
    if ((fclose(f) != 0 || !*out) && !code)
        code = err_set(e, ERR_NO_MEMORY, "no memory for an output target");
    if (code) {
        free(*out);
        *out = NULL;
    }
    return code;
}

#include "supervisor/span.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

// A report older than this is no sign of life; views further apart tell nothing of who fell silent in between.
enum { FRESH_MS = 2000 };
#define GAP_SECONDS 3.0

struct span {
    struct span_nodes of;
    char mark[GATHER_MARK]; // of the last offer
    char *terms;
    int listeners[COMM_MAX_RANKS]; // (n_listeners)
    int n_listeners;
    char places[GATHER_PLACES];
    char formation[GATHER_MARK]; // that the last offer became
    struct comm_tcp_meeting meeting;
    double view_at, heard_at[CONF_MAX_NODES]; // monotonic seconds
};

int span_new(struct span **out, struct err *err)
{
    *out = calloc(1, sizeof **out);
    return *out ? 0 : err_set(err, ERR_NO_MEMORY, "no memory for a group that spans nodes");
}

void span_withdraw(struct span *s)
{
    while (s->n_listeners > 0)
        close(s->listeners[--s->n_listeners]);
}

void span_free(struct span *s)
{
    if (!s)
        return;
    span_withdraw(s);
    free(s->terms);
    free(s);
}

const struct span_nodes *span_nodes(const struct span *s)
{
    return &s->of;
}

// ---- what goes out

static int open_places(struct span *s, const char *address, struct err *err)
{
    size_t used = 0;
    *s->places = '\0';
    for (int i = 0; i < s->of.local_ranks; i++) {
        char place[COMM_TCP_PLACE];
        const int fd = comm_tcp_listen(address, place, err);
        if (fd < 0)
            return err_context(err, "[fleet] address");
        s->listeners[s->n_listeners++] = fd;
        used += (size_t)snprintf(s->places + used, sizeof s->places - used, "%s%s", i ? " " : "", place);
    }
    return 0;
}

static int make_terms(struct span *s, const struct conf_group *g, struct err *err)
{
    char *group = conf_group_terms(g), *all = NULL;
    const int n = group ? asprintf(&all, "version=%s\n%s", DITFLEET_VERSION, group) : -1;
    free(group);
    if (n < 0)
        return err_set(err, ERR_NO_MEMORY, "no memory for a group that spans nodes");
    free(s->terms);
    s->terms = all;
    return n < GATHER_TERMS ? 0
                            : err_set(err, ERR_UNSUPPORTED,
                                      "group %s: the names of its models are too long in all for "
                                      "a group that spans nodes: give it fewer models",
                                      g->name);
}

int span_offer(struct span *s, const struct conf *c, const struct conf_group *g, struct err *err)
{
    uint64_t number = 0;
    span_withdraw(s);
    s->of =
        (struct span_nodes){.n_nodes = g->n_nodes, .me = g->my_node, .ranks = g->ranks, .local_ranks = g->local_ranks};
    snprintf(s->of.group, sizeof s->of.group, "%s", g->name);
    memcpy(s->of.nodes, g->spans, sizeof s->of.nodes);
    s->formation[0] = '\0';
    while (getrandom(&number, sizeof number, 0) != (ssize_t)sizeof number)
        ;
    snprintf(s->mark, sizeof s->mark, "%016" PRIx64, number);
    TRY(make_terms(s, g, err));
    return open_places(s, c->fleet.address, err);
}

void span_report(const struct span *s, enum gather_phase phase, const char *mark, const char *reason,
                 struct gather_node *out)
{
    const bool offers = phase == GATHER_OFFER;
    *out = (struct gather_node){.phase = phase};
    snprintf(out->mark, sizeof out->mark, "%s", offers ? s->mark : phase == GATHER_AWAY ? "" : mark);
    snprintf(out->terms, sizeof out->terms, "%s", offers ? s->terms : "");
    snprintf(out->places, sizeof out->places, "%s", offers ? s->places : "");
    snprintf(out->reason, sizeof out->reason, "%s", phase == GATHER_AWAY ? reason : "");
}

// ---- what comes in

// Where two texts of lines differ first.
static void first_difference(const char *mine, const char *other, char *out, size_t n)
{
    while (*mine && *other && strcspn(mine, "\n") == strcspn(other, "\n") &&
           strncmp(mine, other, strcspn(mine, "\n")) == 0) {
        mine += strcspn(mine, "\n") + (mine[strcspn(mine, "\n")] != '\0');
        other += strcspn(other, "\n") + (other[strcspn(other, "\n")] != '\0');
    }
    snprintf(out, n, "has %.*s where this node has %.*s", (int)strcspn(other, "\n"), other, (int)strcspn(mine, "\n"),
             mine);
}

// What an offer waits for; "" if for nothing but the next view.
static void explain_wait(const struct span *s, const struct gather_view *v, char why[GATHER_REASON])
{
    for (int i = 0; i < v->n_nodes; i++) {
        const struct gather_node *o = &v->nodes[i];
        const char *name = s->of.nodes[i].name;
        char difference[300];
        if (i == s->of.me)
            continue;
        if (o->age_ms < 0 || o->age_ms > FRESH_MS)
            snprintf(why, GATHER_REASON, "node %s %s", name, o->age_ms < 0 ? "was never heard of" : "is silent");
        else if (o->phase == GATHER_AWAY)
            snprintf(why, GATHER_REASON, "node %s has no ranks ready%s%.300s", name, *o->reason ? ": " : "", o->reason);
        else if (o->phase != GATHER_OFFER)
            snprintf(why, GATHER_REASON, "node %s still ends its ranks of another formation", name);
        else if (strcmp(o->terms, s->terms) != 0) {
            first_difference(s->terms, o->terms, difference, sizeof difference);
            snprintf(why, GATHER_REASON, "node %s %s", name, difference);
        } else
            continue;
        return;
    }
}

// The others' places are theirs as long as nobody left the formation.
static bool take_formation(struct span *s, const struct gather_view *v)
{
    int rank = 0;
    s->meeting = (struct comm_tcp_meeting){.size = s->of.ranks};
    snprintf(s->meeting.secret, sizeof s->meeting.secret, "%s", v->secret);
    for (int i = 0; i < v->n_nodes; i++) {
        const char *at = v->nodes[i].places;
        for (int k = 0; k < s->of.nodes[i].ranks; k++) {
            const size_t n = strcspn(at, " ");
            if (n == 0)
                return false;
            snprintf(s->meeting.places[rank++], COMM_TCP_PLACE, "%.*s", (int)n, at);
            at += n + (at[n] == ' ');
        }
    }
    snprintf(s->formation, sizeof s->formation, "%s", v->formation);
    return true;
}

// Whether node i has left this formation, as a fact or by its silence.
static bool has_left(const struct span *s, int i, const char *mark, const struct gather_view *v, double now,
                     char why[GATHER_REASON])
{
    const struct gather_node *o = &v->nodes[i];
    const bool there = (o->phase == GATHER_RUN || o->phase == GATHER_DRAIN) && strcmp(o->mark, mark) == 0;
    const bool heard = o->age_ms >= 0 && o->age_ms <= FRESH_MS;
    if (heard && !there)
        snprintf(why, GATHER_REASON, "node %s ended its ranks%s%.300s", s->of.nodes[i].name, *o->reason ? ": " : "",
                 o->reason);
    else if (now - s->heard_at[i] > SPAN_SILENT_SECONDS)
        snprintf(why, GATHER_REASON, "node %s has said nothing for %.0f s", s->of.nodes[i].name, SPAN_SILENT_SECONDS);
    else
        return false;
    return true;
}

static void note_signs_of_life(struct span *s, const struct gather_view *v, double now)
{
    const bool gap = now - s->view_at > GAP_SECONDS;
    for (int i = 0; i < v->n_nodes; i++)
        if (gap || (v->nodes[i].age_ms >= 0 && v->nodes[i].age_ms <= FRESH_MS))
            s->heard_at[i] = now;
    s->view_at = now;
}

enum span_news span_hear(struct span *s, enum gather_phase phase, const char *mark, const struct gather_view *v,
                         double now, char why[GATHER_REASON])
{
    enum span_news news = SPAN_NOTHING;
    *why = '\0';
    note_signs_of_life(s, v, now);
    if (phase == GATHER_AWAY || v->n_nodes != s->of.n_nodes)
        return SPAN_NOTHING;
    if (phase == GATHER_OFFER && *v->formation && strcmp(v->nodes[s->of.me].places, s->places) == 0)
        return take_formation(s, v) ? SPAN_FORMED : SPAN_NOTHING;
    if (phase == GATHER_OFFER)
        explain_wait(s, v, why);
    for (int i = 0; phase != GATHER_OFFER && i < v->n_nodes; i++) {
        if (i == s->of.me)
            continue;
        if (has_left(s, i, mark, v, now, why))
            return SPAN_OVER;
        if (v->nodes[i].phase == GATHER_DRAIN && strcmp(v->nodes[i].mark, mark) == 0)
            news = SPAN_DRAIN;
    }
    return news;
}

// ---- a formation

const char *span_formation(const struct span *s)
{
    return s->formation;
}

int span_listener(const struct span *s, int i)
{
    return s->listeners[i];
}

int span_meeting(const struct span *s, struct err *err)
{
    const int fd = memfd_create("ditfleet-meeting", MFD_CLOEXEC);
    if (fd < 0 || pwrite(fd, &s->meeting, sizeof s->meeting, 0) != (ssize_t)sizeof s->meeting) {
        err_set(err, ERR_IO, "cannot tell ranks where the others are: %s", strerror(errno));
        if (fd >= 0)
            close(fd);
        return -1;
    }
    return fd;
}

// test_gather.c: nodes of a group offer, form, end and form again; reports late, repeated and lost.
#include "queue_world.h"

#include "proto/gather.h"

#include <string.h>
#include <unistd.h>

static const char *const names[] = {"a", "b", "c"};

// What node `me` of n reports. The caller frees *view.
static void say(struct world *w, int n, int me, enum gather_phase phase, const char *mark, struct gather_view *view)
{
    struct gather_node node = {.phase = phase};
    snprintf(node.mark, sizeof node.mark, "%s", mark);
    snprintf(node.terms, sizeof node.terms, "alike");
    snprintf(node.places, sizeof node.places, "%s:%s", names[me], mark);
    snprintf(node.reason, sizeof node.reason, "reason of %s", names[me]);
    OK(gather(w->q, "wide", names, n, me, &node, view, e));
}

static void assert_waits(struct world *w, int n, int me, enum gather_phase phase, const char *mark)
{
    struct gather_view v;
    say(w, n, me, phase, mark, &v);
    assert_string_equal(v.formation, "");
    assert_string_equal(v.secret, "");
    gather_view_free(&v);
}

// All offer their marks; the last to do so forms it, the others hear of it.
static void form(struct world *w, int n, const char *const marks[], char formation[GATHER_MARK])
{
    struct gather_view v;
    char secret[GATHER_SECRET] = "";
    for (int i = 0; i < n - 1; i++)
        assert_waits(w, n, i, GATHER_OFFER, marks[i]);
    for (int turn = 0; turn < 2; turn++) // once more: a reply was lost
        for (int i = n - 1; i >= 0; i--) {
            say(w, n, i, GATHER_OFFER, marks[i], &v);
            if (!*secret) {
                snprintf(formation, GATHER_MARK, "%s", v.formation);
                snprintf(secret, sizeof secret, "%s", v.secret);
            }
            assert_int_equal(strlen(v.formation), 16);
            assert_int_equal(strlen(v.secret), 24);
            assert_string_equal(v.formation, formation);
            assert_string_equal(v.secret, secret);
            for (int k = 0; k < n; k++) {
                char place[40];
                snprintf(place, sizeof place, "%s:%s", names[k], marks[k]);
                assert_string_equal(v.nodes[k].places, place);
                assert_int_equal(v.nodes[k].phase, GATHER_RUN);
            }
            gather_view_free(&v);
        }
}

static void test_the_last_offer_forms_the_group(void **state)
{
    struct world *w = *state;
    char one[GATHER_MARK], two[GATHER_MARK];
    struct gather_view v;
    form(w, 3, (const char *const[]){"m1", "m2", "m3"}, one);
    say(w, 3, 0, GATHER_RUN, one, &v);
    assert_string_equal(v.nodes[1].mark, one);
    assert_string_equal(v.nodes[1].places, "b:m2"); // for who reads it late
    assert_in_range(v.nodes[1].age_ms, 0, 5000);
    gather_view_free(&v);
    form(w, 3, (const char *const[]){"m4", "m5", "m6"}, two);
    assert_string_not_equal(one, two);
}

static void test_who_is_late_hears_of_the_end(void **state)
{
    struct world *w = *state;
    char one[GATHER_MARK], two[GATHER_MARK];
    struct gather_view v;
    form(w, 2, (const char *const[]){"m1", "m2"}, one);
    say(w, 2, 0, GATHER_AWAY, one, &v); // it fell before b heard that they were formed
    gather_view_free(&v);
    say(w, 2, 1, GATHER_OFFER, "m2", &v);
    assert_string_equal(v.formation, "");
    assert_int_equal(v.nodes[0].phase, GATHER_AWAY);
    assert_string_equal(v.nodes[0].reason, "reason of a");
    gather_view_free(&v);
    say(w, 2, 0, GATHER_OFFER, "m3", &v); // b's offer stands again
    assert_string_not_equal(v.formation, "");
    assert_string_not_equal(v.formation, one);
    snprintf(two, sizeof two, "%s", v.formation);
    gather_view_free(&v);
    say(w, 2, 1, GATHER_DRAIN, two, &v);
    gather_view_free(&v);
    say(w, 2, 0, GATHER_RUN, two, &v);
    assert_int_equal(v.nodes[1].phase, GATHER_DRAIN);
    gather_view_free(&v);
}

static void test_nobody_is_formed_with_the_absent(void **state)
{
    struct world *w = *state;
    struct gather_view v;
    struct gather_node other = {.phase = GATHER_OFFER, .mark = "m2", .terms = "different", .places = "b"};
    assert_waits(w, 2, 0, GATHER_OFFER, "m1");
    OK(gather(w->q, "wide", names, 2, 1, &other, &v, e));
    assert_string_equal(v.formation, ""); // other terms
    assert_string_equal(v.nodes[0].terms, "alike");
    gather_view_free(&v);
    assert_waits(w, 2, 1, GATHER_AWAY, "m2");
    assert_waits(w, 2, 0, GATHER_OFFER, "m1");
    say(w, 3, 0, GATHER_OFFER, "m1", &v);
    assert_int_equal(v.nodes[2].age_ms, -1); // never seen
    gather_view_free(&v);
    usleep(2200000); // a's offer is old: it may be gone
    assert_waits(w, 2, 1, GATHER_OFFER, "m3");
    say(w, 2, 0, GATHER_OFFER, "m1", &v);
    assert_string_not_equal(v.formation, "");
    gather_view_free(&v);
    assert_in_range(number(w, "PTTL " PREFIX "group:wide"), 1, 86400000);
}

static void test_a_server_that_lost_its_data(void **state)
{
    struct world *w = *state;
    char one[GATHER_MARK];
    struct gather_view v;
    form(w, 2, (const char *const[]){"m1", "m2"}, one);
    freeReplyObject(command(w, "FLUSHALL"));
    say(w, 2, 0, GATHER_RUN, one, &v);
    assert_int_equal(v.nodes[1].age_ms, -1); // not heard of, which is not gone
    gather_view_free(&v);
    say(w, 2, 1, GATHER_RUN, one, &v);
    assert_int_equal(v.nodes[0].phase, GATHER_RUN);
    assert_string_equal(v.nodes[0].mark, one);
    gather_view_free(&v);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_the_last_offer_forms_the_group),
        TEST(test_who_is_late_hears_of_the_end),
        TEST(test_nobody_is_formed_with_the_absent),
        TEST(test_a_server_that_lost_its_data),
    };
    return cmocka_run_group_tests(tests, start, stop);
}

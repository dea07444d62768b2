#include "ops/cli/nearest.h"

#include <string.h>

enum { LONGEST = 64 };

static int least(int a, int b, int c)
{
    const int ab = a < b ? a : b;
    return ab < c ? ab : c;
}

// Optimal string alignment: rows of the table for i, i - 1 and i - 2 letters of a.
static int distance(const char *a, const char *b)
{
    int rows[3][LONGEST + 1], *before = rows[0], *last = rows[1], *now = rows[2];
    const int n = (int)strlen(b);
    for (int j = 0; j <= n; j++)
        last[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        now[0] = i;
        for (int j = 1; j <= n; j++) {
            now[j] = least(last[j] + 1, now[j - 1] + 1, last[j - 1] + (a[i - 1] != b[j - 1]));
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && before[j - 2] + 1 < now[j])
                now[j] = before[j - 2] + 1;
        }
        int *spare = before;
        before = last, last = now, now = spare;
    }
    return last[n];
}

void nearest_offer(struct nearest *n, const char *word)
{
    const size_t length = strlen(word), typed = strlen(n->typed);
    if (length > LONGEST || typed > LONGEST)
        return;
    const int d = distance(n->typed, word), most = length < 9 ? (int)(length + 2) / 3 : 3;
    if (d <= most && (!n->word || d < n->distance)) {
        n->word = word;
        n->distance = d;
    }
}

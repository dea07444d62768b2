// nearest.h: the word that somebody meant who mistyped one.
#ifndef DITFLEET_CLI_NEAREST_H
#define DITFLEET_CLI_NEAREST_H

struct nearest {
    const char *typed;
    const char *word; // the best so far; NULL: none is near
    int distance;     // of word
};

// Offers one of the words that are allowed; it must outlive the struct. One is near when no more than a third of its
// letters, and three at most, were changed, left out, put in or swapped with their neighbour (Damerau, Levenshtein).
void nearest_offer(struct nearest *n, const char *word);

#endif

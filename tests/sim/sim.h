// sim.h: the queue's own code in C and its script, driven by many actors through random faults, all drawn from a seed.
#ifndef DITFLEET_SIM_SIM_H
#define DITFLEET_SIM_SIM_H

#include "server.h"

struct sim_options {
    uint64_t seed;
    unsigned long commands;    // how many the server runs before everything has to come to rest
    const struct patch *patch; // a defect planted in queue.lua, or NULL
    unsigned long trace_from;  // commands from this one on are printed; 0: none
};

// What happened, for who wants to know that it did.
struct sim_counts {
    unsigned long commands, transitions; // transitions: commands that changed something
    unsigned long jobs, succeeded, dead, cancelled, expired;
    unsigned long kills, stalls, jumps, failovers, lost_requests, lost_replies, late, refusals, misplaced, groups_lost;
};

// false: a promise is broken (why, at which command), or the actors could not bring every job to its end. Adds to
// *counts.
bool sim_run(const struct sim_options *options, struct sim_counts *counts, char why[512]);

#endif

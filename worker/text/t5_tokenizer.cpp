// t5_tokenizer.cpp: the C++ side of t5_tokenizer.h. sentencepiece has no C interface; no exception leaves this file.
//
// sentencepiece reads the model and normalises the text. The best path is searched here: Debian's sentencepiece sums
// scores in float32, whose rounding breaks ties ("0" "00" against "00" "0") by chance; the reference sums exactly.
#include "worker/text/t5_tokenizer.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <new>
#include <sentencepiece_processor.h>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utf8proc.h>
#include <vector>

struct t5_tokenizer {
    sentencepiece::SentencePieceProcessor model;
    std::unordered_map<std::string_view, int> pieces; // text, owned by model, to id: all that text may be cut into
    size_t longest_piece = 0;                         // bytes
    double unknown_score = 0;                         // of a character that is no piece
};

namespace
{

// Bytes of text. sentencepiece joins a run of unknown characters in time quadratic in its length: 0.6 s at this bound.
constexpr size_t longest = size_t{1} << 17;

// Runs body and turns what it throws into an error.
template <typename Body> int guarded(struct err *e, Body body)
{
    try {
        return body();
    } catch (const std::bad_alloc &) {
        return err_set(e, ERR_NO_MEMORY, "no memory for the T5 tokenizer");
    } catch (const std::exception &) { // its text might hold the prompt
        return err_set(e, ERR_INTERNAL, "the T5 tokenizer failed inside sentencepiece");
    }
}

int list_pieces(struct t5_tokenizer &t, const std::string &path, struct err *e)
{
    double lowest = std::numeric_limits<double>::max();
    for (int id = 0; id < t.model.GetPieceSize(); id++) {
        if (t.model.IsByte(id))
            return err_set(e, ERR_UNSUPPORTED, "%s: has byte pieces; no T5 of a picture model has", path.c_str());
        if (t.model.IsControl(id) || t.model.IsUnknown(id))
            continue;
        const std::string &piece = t.model.IdToPiece(id);
        if (!std::isfinite(t.model.GetScore(id)))
            return err_set(e, ERR_CORRUPT, "%s: piece %d has no finite score", path.c_str(), id);
        lowest = std::min(lowest, double{t.model.GetScore(id)});
        t.longest_piece = std::max(t.longest_piece, piece.size());
        if (!t.model.IsUnused(id))
            t.pieces.emplace(piece, id);
    }
    t.unknown_score = lowest - 10; // sentencepiece's kUnkPenalty
    return 0;
}

int read_model(struct t5_tokenizer &t, const std::string &path, struct err *e)
{
    errno = 0;
    std::ifstream file(path, std::ios::binary);
    if (!file)
        return err_set(e, errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%s: %s; a T5 tokenizer folder holds spiece.model",
                       path.c_str(), std::strerror(errno));
    const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (file.bad())
        return err_set(e, ERR_IO, "%s: cannot be read", path.c_str());
    // An empty file parses as an empty model, which sentencepiece takes for a bug of the caller's.
    if (bytes.empty() || !t.model.LoadFromSerializedProto(bytes).ok())
        return err_set(e, ERR_CORRUPT, "%s: not a sentencepiece model, or damaged", path.c_str());
    if (t.model.eos_id() < 0 || t.model.pad_id() < 0)
        return err_set(e, ERR_UNSUPPORTED, "%s: has no </s> or no <pad>; T5 needs both", path.c_str());
    return list_pieces(t, path, e);
}

// What sentencepiece cuts into pieces: NFKC, white space as U+2581 and one of it in front. Its pieces spell it.
int normalise(const struct t5_tokenizer &t, std::string_view text, std::string &out, struct err *e)
{
    sentencepiece::ImmutableSentencePieceText spelled;
    if (!t.model.Encode({text.data(), text.size()}, spelled.mutable_proto()).ok())
        return err_set(e, ERR_INTERNAL, "sentencepiece cannot encode the text");
    for (size_t i = 0; i < spelled.pieces_size(); i++)
        out += spelled.pieces(static_cast<int>(i)).piece();
    return 0;
}

size_t char_length(unsigned char first)
{
    return first < 0xC0 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
}

struct ending { // the best path from the start of the text to one of its bytes
    double score = -std::numeric_limits<double>::infinity();
    size_t last_begin = 0; // where its last piece starts
    int last_id = 0;
};

void improve(ending &best, double score, size_t begin, int id)
{
    if (score > best.score) // of equals the first stays: the longest last piece
        best = {score, begin, id};
}

// The cut into pieces of highest total score; characters that are no piece are unknown, a run of them one token.
std::vector<int> best_path(const struct t5_tokenizer &t, std::string_view text)
{
    std::vector<ending> best(text.size() + 1);
    best[0].score = 0;
    for (size_t begin = 0, step = 0; begin < text.size(); begin += step) {
        step = std::min(char_length(static_cast<unsigned char>(text[begin])), text.size() - begin);
        const double score = best[begin].score;
        const size_t room = std::min(t.longest_piece, text.size() - begin);
        bool single = false;
        for (size_t n = step; n <= room; n += char_length(static_cast<unsigned char>(text[begin + n]))) {
            const auto piece = t.pieces.find(text.substr(begin, n));
            if (piece != t.pieces.end()) {
                improve(best[begin + n], score + t.model.GetScore(piece->second), begin, piece->second);
                single = single || n == step;
            }
            if (begin + n == text.size())
                break;
        }
        if (!single)
            improve(best[begin + step], score + t.unknown_score, begin, t.model.unk_id());
    }
    std::vector<int> ids;
    for (size_t end = text.size(); end > 0; end = best[end].last_begin)
        if (ids.empty() || ids.back() != t.model.unk_id() || best[end].last_id != t.model.unk_id())
            ids.push_back(best[end].last_id);
    std::reverse(ids.begin(), ids.end());
    return ids;
}

int check_utf8(const char *text, size_t length, struct err *e)
{
    const auto *bytes = reinterpret_cast<const utf8proc_uint8_t *>(text);
    for (size_t i = 0; i < length;) {
        utf8proc_int32_t c = 0;
        const utf8proc_ssize_t n = utf8proc_iterate(bytes + i, static_cast<utf8proc_ssize_t>(length - i), &c);
        if (n <= 0)
            return err_set(e, ERR_INVALID, "the text is not valid UTF-8 at byte %zu", i);
        i += static_cast<size_t>(n);
    }
    return 0;
}

} // namespace

extern "C" int t5_tokenizer_load(const char *dir, struct t5_tokenizer **out, struct err *e)
{
    return guarded(e, [&] {
        auto *t = new t5_tokenizer;
        const int rc = guarded(e, [&] { return read_model(*t, std::string(dir) + "/spiece.model", e); });
        if (rc != 0)
            delete t;
        else
            *out = t;
        return rc;
    });
}

extern "C" void t5_tokenizer_free(struct t5_tokenizer *t)
{
    delete t;
}

extern "C" int t5_tokenizer_encode(const struct t5_tokenizer *t, const char *text, size_t length, int max_length,
                                   int32_t *ids, int64_t *count, struct err *e)
{
    if (max_length < 1)
        return err_set(e, ERR_INVALID, "a T5 prompt has at least 1 token, not %d", max_length);
    if (length > longest)
        return err_set(e, ERR_INVALID, "the text has %zu bytes; up to %zu are allowed", length, longest);
    return guarded(e, [&] {
        TRY(check_utf8(text, length, e));
        std::string plain;
        TRY(normalise(*t, {text, length}, plain, e));
        std::vector<int> tokens = best_path(*t, plain);
        const auto room = static_cast<size_t>(max_length);
        *count = static_cast<int64_t>(tokens.size()) + 1;
        tokens.resize(std::min(tokens.size(), room - 1));
        tokens.push_back(t->model.eos_id());
        tokens.resize(room, t->model.pad_id());
        std::copy(tokens.begin(), tokens.end(), ids);
        return 0;
    });
}

extern "C" int32_t t5_tokenizer_id_limit(const struct t5_tokenizer *t)
{
    return t->model.GetPieceSize();
}

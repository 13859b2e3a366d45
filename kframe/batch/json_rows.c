/* Takes JSON objects apart into columns, where that leaves no question open.
 *
 * A text is taken when it is one standard JSON object whose every value of a column is shown to be exactly one
 * of the column's type. Whatever needs a closer look (a misfit, a repeated or escaped name, a numeral of many
 * digits, lenient syntax) is refused untouched, for others to decide. Texts are valid UTF-8.
 */
#define _GNU_SOURCE /* strtod_l */
#include <float.h>
#include <locale.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __APPLE__
#include <xlocale.h>
#endif

enum { DEPTH_MAX = 64, DIGITS_MAX = 18 }; /* any 18 digits fit an int64 */
enum kind { BOOL, INT, FLOAT, TEXT, TIMESTAMP, DATE, DECIMAL, JSON, LIST, STRUCT };
enum answer { REFUSED, TAKEN, OUT_OF_MEMORY };

typedef struct column column_t;
struct column {
    const char *name;
    int32_t name_size, kind, width, required;
    int64_t low, high;     /* of an INT */
    int32_t digits, scale; /* of a DECIMAL; a TIMESTAMP's scale is the digits of its fraction */
    int32_t zone, next;    /* next: the member whose name came behind this one's the last time */
    int64_t seen;          /* the object that had it last, by number; of the whole: how many there were */
    uint8_t *values, *valid;
    int32_t *ends;         /* of a TEXT, JSON or LIST */
    int64_t rows_max, capacity;
    column_t *members;     /* of a STRUCT; one of a LIST */
    int64_t count;         /* of members */
};

typedef struct {
    const uint8_t *at, *end;
    int64_t objects; /* that are a row of columns, so far */
} text_t;

typedef struct {
    const uint8_t *begin;
    uint64_t digits; /* all of them as one number, while there are at most DIGITS_MAX */
    int64_t count, exponent;
    int negative, whole, scientific;
} number_t;

static const uint64_t ONES = 0x0101010101010101u, HIGHS = 0x8080808080808080u;
static const double TENS[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                              1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
static locale_t c_locale;

/* ---- JSON ---------------------------------------------------------------------------------------- */

static int next_is(text_t *t, uint8_t c) {
    if (t->at == t->end || *t->at != c) return 0;
    t->at++;
    return 1;
}

static void skip_space(text_t *t) {
    while (t->at < t->end && (*t->at == ' ' || *t->at == '\n' || *t->at == '\t' || *t->at == '\r')) t->at++;
}

static int next_is_behind_space(text_t *t, uint8_t c) {
    if (next_is(t, c)) return 1;
    skip_space(t);
    return next_is(t, c);
}

static int next_are(text_t *t, const char *word, int64_t size) {
    if (t->end - t->at < size || memcmp(t->at, word, size)) return 0;
    t->at += size;
    return 1;
}

static int digit(const text_t *t) { return t->at < t->end && (uint8_t)(*t->at - '0') < 10; }

/* To where a string's plain characters end: at a quote, a backslash or a control character. */
static void skip_plain(text_t *t) {
    for (; t->end - t->at >= 8; t->at += 8) {
        uint64_t w;
        memcpy(&w, t->at, 8);
        uint64_t quote = w ^ (ONES * '"'), slash = w ^ (ONES * '\\');
        if ((((quote - ONES) & ~quote) | ((slash - ONES) & ~slash) | ((w - ONES * 0x20) & ~w)) & HIGHS) break;
    }
    while (t->at < t->end && *t->at != '"' && *t->at != '\\' && *t->at >= 0x20) t->at++;
}

static int hex4(text_t *t, uint32_t *code) {
    if (t->end - t->at < 4) return 0;
    *code = 0;
    for (int i = 0; i < 4; i++) {
        uint8_t c = *t->at++, low = c | 0x20;
        if ((uint8_t)(c - '0') < 10) *code = *code << 4 | (c - '0');
        else if (low >= 'a' && low <= 'f') *code = *code << 4 | (low - 'a' + 10);
        else return 0;
    }
    return 1;
}

/* The character behind a backslash, as UTF-8 into `out`; returns its bytes, 0: refused. */
static int escaped(text_t *t, uint8_t *out) {
    static const char written[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    if (t->at == t->end) return 0;
    uint8_t c = *t->at++;
    const char *simple = c ? strchr(written, c) : NULL;
    uint32_t code, low;
    if (simple) {
        *out = (uint8_t)meant[simple - written];
        return 1;
    }
    if (c != 'u' || !hex4(t, &code) || !code) return 0;
    if (code >= 0xD800 && code < 0xE000) {
        if (code >= 0xDC00 || !next_are(t, "\\u", 2) || !hex4(t, &low) || low < 0xDC00 || low > 0xDFFF) return 0;
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    int size = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (int i = size - 1; i > 0; i--, code >>= 6) out[i] = (uint8_t)(0x80 | (code & 0x3F));
    out[0] = (uint8_t)(code | (size == 1 ? 0 : 0xF00u >> size));
    return size;
}

/* Behind the quote that opened a string, to behind the one that closes it. */
static int skip_string(text_t *t) {
    uint8_t out[4];
    for (;;) {
        skip_plain(t);
        if (next_is(t, '"')) return 1;
        if (!next_is(t, '\\') || !escaped(t, out)) return 0;
    }
}

static void take_digits(text_t *t, number_t *n) {
    for (; digit(t); t->at++) {
        if (n->count || *t->at != '0') n->count++;
        if (n->count <= DIGITS_MAX) n->digits = n->digits * 10 + (*t->at - '0');
    }
}

static int take_number(text_t *t, number_t *n) {
    *n = (number_t){.begin = t->at, .whole = 1};
    n->negative = next_is(t, '-');
    if (!digit(t)) return 0;
    if (*t->at == '0') t->at++;
    else take_digits(t, n);
    if (digit(t)) return 0; /* no zero leads */
    if (next_is(t, '.')) {
        const uint8_t *point = t->at;
        take_digits(t, n);
        if (t->at == point) return 0;
        n->exponent = point - t->at;
        n->whole = 0;
    }
    if (next_is(t, 'e') || next_is(t, 'E')) {
        int negative = next_is(t, '-'), power = 0;
        if (!negative) next_is(t, '+');
        if (!digit(t)) return 0;
        for (; digit(t); t->at++)
            if (power < 100000) power = power * 10 + (*t->at - '0');
        n->exponent += negative ? -power : power;
        n->whole = 0;
        n->scientific = 1;
    }
    return 1;
}

/* Room for `size` bytes of text. */
static int room_for(column_t *c, int64_t size) {
    if (size <= c->capacity) return 1;
    uint8_t *grown = realloc(c->values, size + size / 2 + 4096);
    if (!grown) return 0;
    c->values = grown;
    c->capacity = size + size / 2 + 4096;
    return 1;
}

/* Where passed values are copied to, without the space between their parts; no column: nowhere. */
typedef struct {
    column_t *column;
    int64_t end;
} copy_t;

static int put(copy_t *copy, const uint8_t *begin, const uint8_t *end) {
    if (!copy->column) return 1;
    if (!room_for(copy->column, copy->end + (end - begin))) return 0;
    memcpy(copy->column->values + copy->end, begin, end - begin);
    copy->end += end - begin;
    return 1;
}

static int pass(text_t *t, uint8_t c, copy_t *copy) {
    return next_is_behind_space(t, c) && put(copy, t->at - 1, t->at);
}

static int pass_word(text_t *t, const char *word, copy_t *copy) {
    int64_t size = (int64_t)strlen(word);
    return next_are(t, word, size) && put(copy, t->at - size, t->at);
}

static int pass_string(text_t *t, copy_t *copy) {
    if (!next_is_behind_space(t, '"')) return 0;
    const uint8_t *begin = t->at - 1;
    if (!skip_string(t)) return 0;
    return !copy->column || (!memchr(begin, '\\', t->at - begin) && put(copy, begin, t->at));
}

/* Copied are only numerals that whoever parses and writes them leaves as they are. */
static int pass_number(text_t *t, copy_t *copy) {
    number_t n;
    const uint8_t *begin = t->at;
    if (!take_number(t, &n)) return 0;
    if (!copy->column) return n.exponent + n.count < DBL_MAX_10_EXP;
    int plain = n.whole ? n.count <= DIGITS_MAX && (n.count || !n.negative)
                        : n.count && n.count <= DBL_DIG && !n.scientific && n.count + n.exponent > -3 &&
                              (t->at[-1] != '0' || n.exponent == -1);
    return plain && put(copy, begin, t->at);
}

static int pass_value(text_t *t, int depth, copy_t *copy) {
    skip_space(t);
    if (t->at == t->end || depth == DEPTH_MAX) return 0;
    switch (*t->at) {
    case '"': return pass_string(t, copy);
    case 't': return pass_word(t, "true", copy);
    case 'f': return pass_word(t, "false", copy);
    case 'n': return pass_word(t, "null", copy);
    case '[':
        if (!pass(t, '[', copy)) return 0;
        if (pass(t, ']', copy)) return 1;
        do
            if (!pass_value(t, depth + 1, copy)) return 0;
        while (pass(t, ',', copy));
        return pass(t, ']', copy);
    case '{':
        if (!pass(t, '{', copy)) return 0;
        if (pass(t, '}', copy)) return 1;
        do
            if (!pass_string(t, copy) || !pass(t, ':', copy) || !pass_value(t, depth + 1, copy)) return 0;
        while (pass(t, ',', copy));
        return pass(t, '}', copy);
    default: return pass_number(t, copy);
    }
}

/* ---- values -------------------------------------------------------------------------------------- */

static void *value_of(column_t *c, int64_t row) { return c->values + row * c->width; }

static int store_int(column_t *c, int64_t row, int64_t value) {
    if (value < c->low || value > c->high) return REFUSED;
    switch (c->width) {
    case 1: *(uint8_t *)value_of(c, row) = (uint8_t)value; break;
    case 2: *(uint16_t *)value_of(c, row) = (uint16_t)value; break;
    case 4: *(uint32_t *)value_of(c, row) = (uint32_t)value; break;
    default: *(int64_t *)value_of(c, row) = value;
    }
    return TAKEN;
}

static int take_int(column_t *c, int64_t row, text_t *t) {
    number_t n;
    if (!take_number(t, &n) || !n.whole || n.count > DIGITS_MAX) return REFUSED;
    return store_int(c, row, n.negative ? -(int64_t)n.digits : (int64_t)n.digits);
}

static int take_float(column_t *c, int64_t row, text_t *t) {
    number_t n;
    double value;
    if (!take_number(t, &n) || (n.negative && !n.count)) return REFUSED; /* which zero is a question of its own */
    if (FLT_EVAL_METHOD == 0 && n.count <= DIGITS_MAX && n.digits < 1ull << 53 && llabs(n.exponent) <= 22) {
        /* both exact, so that the one rounding is right */
        value = n.exponent < 0 ? n.digits / TENS[-n.exponent] : n.digits * TENS[n.exponent];
        if (n.negative) value = -value;
    } else if (t->at < t->end) { /* what follows ends it */
        value = strtod_l((const char *)n.begin, NULL, c_locale);
    } else {
        return REFUSED;
    }
    if (!(fabs(value) < (c->width == 4 ? 3.4028235677973366e38 : INFINITY))) return REFUSED;
    if (c->width == 4) *(float *)value_of(c, row) = (float)value;
    else *(double *)value_of(c, row) = value;
    return TAKEN;
}

static int take_bool(column_t *c, int64_t row, text_t *t) {
    uint8_t *value = value_of(c, row);
    *value = next_are(t, "true", 4);
    return *value || next_are(t, "false", 5) ? TAKEN : REFUSED;
}

static int take_text(column_t *c, int64_t row, text_t *t) {
    int64_t end = c->ends[row];
    if (!next_is(t, '"')) return REFUSED;
    for (;;) {
        const uint8_t *begin = t->at;
        skip_plain(t);
        int64_t size = t->at - begin;
        if (!room_for(c, end + size + 4)) return OUT_OF_MEMORY;
        memcpy(c->values + end, begin, size);
        end += size;
        if (next_is(t, '"')) break;
        int more = next_is(t, '\\') ? escaped(t, c->values + end) : 0;
        if (!more) return REFUSED;
        end += more;
    }
    c->ends[row + 1] = (int32_t)end;
    return TAKEN;
}

static int two_digits(text_t *t, int low, int high) {
    if (t->end - t->at < 2 || (uint8_t)(t->at[0] - '0') > 9 || (uint8_t)(t->at[1] - '0') > 9) return -1;
    int value = (t->at[0] - '0') * 10 + t->at[1] - '0';
    t->at += 2;
    return low <= value && value <= high ? value : -1;
}

/* Days since 1970-01-01 of a day from the year 1000 on; counted in years that begin in March. */
static int take_day(text_t *t, int64_t *days) {
    static const uint8_t lengths[] = {31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    int century = two_digits(t, 10, 99), rest = two_digits(t, 0, 99);
    if (century < 0 || rest < 0 || !next_is(t, '-')) return 0;
    int month = two_digits(t, 1, 12);
    if (month < 0 || !next_is(t, '-')) return 0;
    int day = two_digits(t, 1, lengths[month - 1]), year = century * 100 + rest;
    if (day < 0 || (day == 29 && month == 2 && (year % 4 || (year % 100 == 0 && year % 400)))) return 0;
    int64_t y = year - (month <= 2), of_year = (153 * (month + (month > 2 ? -3 : 9)) + 2) / 5 + day - 1;
    *days = y * 365 + y / 4 - y / 100 + y / 400 + of_year - 719468;
    return 1;
}

static int take_date(column_t *c, int64_t row, text_t *t) {
    int64_t days;
    if (!next_is(t, '"') || !take_day(t, &days) || !next_is(t, '"')) return REFUSED;
    *(int32_t *)value_of(c, row) = (int32_t)days;
    return TAKEN;
}

/* Seconds that a zone's clock is ahead. */
static int take_zone(const column_t *c, text_t *t, int64_t *ahead) {
    *ahead = 0;
    if (t->at < t->end && *t->at == '"') return 1;
    if (!c->zone) return 0;
    if (next_is(t, 'Z')) return 1;
    int negative = next_is(t, '-');
    if (!negative && !next_is(t, '+')) return 0;
    int hours = two_digits(t, 0, 23);
    next_is(t, ':');
    int minutes = two_digits(t, 0, 59);
    *ahead = (hours * 60 + minutes) * (negative ? -60 : 60);
    return hours >= 0 && minutes >= 0;
}

static int take_moment(column_t *c, int64_t row, text_t *t) {
    int64_t days, ahead, fraction = 0, per_second = 1;
    int digits = 0;
    if (!next_is(t, '"') || !take_day(t, &days) || !(next_is(t, 'T') || next_is(t, ' '))) return REFUSED;
    int hours = two_digits(t, 0, 23);
    if (hours < 0 || !next_is(t, ':')) return REFUSED;
    int minutes = two_digits(t, 0, 59);
    if (minutes < 0 || !next_is(t, ':')) return REFUSED;
    int seconds = two_digits(t, 0, 59);
    if (seconds < 0) return REFUSED;
    if (next_is(t, '.')) {
        for (; digit(t) && digits <= c->scale; t->at++, digits++) fraction = fraction * 10 + (*t->at - '0');
        if (!digits || digits > c->scale) return REFUSED;
    }
    for (int i = 0; i < c->scale; i++) {
        per_second *= 10;
        if (i >= digits) fraction *= 10;
    }
    if (!take_zone(c, t, &ahead) || !next_is(t, '"')) return REFUSED;
    int64_t second = days * 86400 + hours * 3600 + minutes * 60 + seconds - ahead;
    return store_int(c, row, second * per_second + fraction);
}

/* Text, or the count of the unit since the epoch. */
static int take_timestamp(column_t *c, int64_t row, text_t *t) {
    return t->at < t->end && *t->at == '"' ? take_moment(c, row, t) : take_int(c, row, t);
}

static int take_decimal(column_t *c, int64_t row, text_t *t) {
    number_t n;
    int quoted = next_is(t, '"');
    if (!take_number(t, &n) || (quoted && !next_is(t, '"'))) return REFUSED;
    int64_t digits = n.count, places = c->scale + n.exponent;
    if (n.exponent > 0 || places < 0 || digits + places > DIGITS_MAX || digits + places > c->digits) return REFUSED;
    int64_t value = (int64_t)n.digits;
    for (; places > 0; places--) value *= 10;
    int64_t *words = value_of(c, row); /* 128 bits */
    uint16_t one = 1;
    int low = *(uint8_t *)&one ? 0 : 1;
    words[low] = n.negative ? -value : value;
    words[!low] = words[low] < 0 ? -1 : 0;
    return TAKEN;
}

static int take_json(column_t *c, int64_t row, text_t *t) {
    copy_t copy = {c, c->ends[row]};
    if (!pass_value(t, 1, &copy)) return REFUSED;
    c->ends[row + 1] = (int32_t)copy.end;
    return TAKEN;
}

static int room_for_rows(column_t *c, int64_t rows);
static int take_list(column_t *c, int64_t row, text_t *t);
static int take_struct(column_t *c, int64_t row, text_t *t);

static int take_value(column_t *c, int64_t row, text_t *t) {
    static int (*const take[])(column_t *, int64_t, text_t *) = {
        take_bool,      take_int,  take_float,   take_text, take_timestamp,
        take_date,      take_decimal, take_json, take_list, take_struct,
    };
    c->valid[row] = !next_are(t, "null", 4);
    return c->valid[row] ? take[c->kind](c, row, t) : TAKEN;
}

/* Make the value a NULL. */
static int blank(column_t *c, int64_t row) {
    c->valid[row] = 0;
    if (c->ends) c->ends[row + 1] = c->ends[row];
    else if (c->width) memset(value_of(c, row), 0, c->width);
    else
        for (int64_t i = 0; i < c->count; i++) blank(&c->members[i], row);
    return !c->required;
}

static int take_list(column_t *c, int64_t row, text_t *t) {
    column_t *item = c->members;
    int32_t end = c->ends[row];
    if (!next_is(t, '[')) return REFUSED;
    if (!next_is_behind_space(t, ']')) {
        do {
            if (!room_for_rows(item, end + 1)) return OUT_OF_MEMORY;
            skip_space(t);
            int answer = take_value(item, end, t);
            if (answer != TAKEN) return answer;
            if (!item->valid[end]) blank(item, end);
            end++;
        } while (next_is_behind_space(t, ','));
        if (!next_is(t, ']')) return REFUSED;
    }
    c->ends[row + 1] = end;
    return TAKEN;
}

/* ---- rows ---------------------------------------------------------------------------------------- */

/* The member of a name; -1: none. */
static int32_t find(const column_t *c, const uint8_t *name, int64_t size) {
    for (int32_t i = 0; i < c->count; i++)
        if (c->members[i].name_size == size && !memcmp(c->members[i].name, name, size)) return i;
    return -1;
}

/* A name, and whose it is, tried first as `likeliest`'s, which spares a look at its end. 0: refused. */
static int take_name(const column_t *c, int32_t likeliest, text_t *t, int32_t *member) {
    const column_t *m = &c->members[likeliest];
    const uint8_t *name = t->at;
    *member = likeliest;
    if (next_are(t, m->name, m->name_size) && next_is(t, '"')) return 1;
    t->at = name;
    skip_plain(t);
    *member = find(c, name, t->at - name);
    return next_is(t, '"');
}

static int take_members(column_t *c, int64_t row, text_t *t, int64_t object) {
    copy_t nowhere = {NULL, 0};
    column_t *before = &c->members[c->count - 1];
    int32_t member;
    do {
        if (!next_is_behind_space(t, '"') || !take_name(c, before->next, t, &member)) return REFUSED;
        if (!next_is_behind_space(t, ':')) return REFUSED;
        skip_space(t);
        if (member < 0) {
            if (!pass_value(t, 1, &nowhere)) return REFUSED;
            continue;
        }
        column_t *m = &c->members[member];
        if (m->seen == object) return REFUSED;
        m->seen = object;
        before->next = member;
        before = m;
        int answer = take_value(m, row, t);
        if (answer != TAKEN) return answer;
    } while (next_is_behind_space(t, ','));
    return next_is(t, '}') ? TAKEN : REFUSED;
}

static int take_struct(column_t *c, int64_t row, text_t *t) {
    int64_t object = ++t->objects;
    if (!next_is(t, '{')) return REFUSED;
    if (!next_is_behind_space(t, '}')) {
        int answer = take_members(c, row, t, object);
        if (answer != TAKEN) return answer;
    }
    for (int64_t i = 0; i < c->count; i++) {
        column_t *m = &c->members[i];
        if ((m->seen != object || !m->valid[row]) && !blank(m, row)) return REFUSED;
    }
    return TAKEN;
}

static int room_for_rows(column_t *c, int64_t rows) {
    for (int64_t i = 0; c->kind == STRUCT && i < c->count; i++)
        if (!room_for_rows(&c->members[i], rows)) return 0;
    if (rows <= c->rows_max) return 1;
    rows += rows / 2;
    uint8_t *valid = realloc(c->valid, rows);
    if (!valid) return 0;
    c->valid = valid;
    if (c->kind == TEXT || c->kind == JSON || c->kind == LIST) {
        int32_t *ends = realloc(c->ends, (rows + 1) * sizeof *ends);
        if (!ends) return 0;
        c->ends = ends;
        ends[0] = 0;
    } else if (c->width) {
        uint8_t *values = realloc(c->values, rows * c->width);
        if (!values) return 0;
        c->values = values;
    }
    c->rows_max = rows;
    return 1;
}

/* Take what can be taken of `count` texts, text i between bounds[i] and bounds[i + 1]; `taken` says which.
 * `whole` is a STRUCT of the columns. Returns how many rows they hold then, or -1: out of memory. */
int64_t json_rows(column_t *whole, const uint8_t *data, const int32_t *bounds, int64_t count, uint8_t *taken) {
    int64_t row = 0;
    if (!c_locale) c_locale = newlocale(LC_ALL_MASK, "C", NULL);
    if (!c_locale || !room_for_rows(whole, count)) return -1;
    for (int64_t i = 0; i < count; i++) {
        text_t text = {data + bounds[i], data + bounds[i + 1], whole->seen};
        skip_space(&text);
        int answer = take_struct(whole, row, &text);
        whole->seen = text.objects;
        if (answer == OUT_OF_MEMORY) return -1;
        skip_space(&text);
        taken[i] = answer == TAKEN && text.at == text.end;
        row += taken[i];
    }
    return row;
}

/* Free what the columns hold. */
void json_free(column_t *c) {
    for (int64_t i = 0; i < c->count; i++) json_free(&c->members[i]);
    free(c->values);
    free(c->valid);
    free(c->ends);
}

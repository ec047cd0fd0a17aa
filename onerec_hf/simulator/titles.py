"""Word lists of the simulated videos: 20 categories, each with ten subjects, five title templates and eight details.

Written for this package; no text comes from a real data set. A title is `template.format(subject) + ", " + detail`, so
its words tell the category and the subject, which are also the coarse parts of the item's latent vector.
"""

import numpy as np

# category: (subjects, templates, details), each separated by "|"
_WORDS = {
    "cooking": (
        "spicy ramen|pork dumplings|sourdough bread|chicken curry|fluffy pancakes|egg fried rice|fish tacos"
        "|baked cheesecake|beef hot pot|kimchi stew",
        "Making {} from scratch|{} for beginners|My grandmother's {}|{} on a tiny budget|The secret to perfect {}",
        "in fifteen minutes|step by step|with only five ingredients|the way restaurants do it|no fancy tools"
        "|for a rainy evening|with a crispy twist|tested three times",
    ),
    "football": (
        "free kicks|penalty saves|long passes|bicycle kicks|nutmegs|headers|counterattacks|corner routines"
        "|through balls|slide tackles",
        "The best {} of the week|How to train {}|{} that fooled everyone|A coach explains {}|Street football {}",
        "in slow motion|from every angle|ranked by fans|with live commentary|youth league edition|at full speed"
        "|filmed from the stands|drills included",
    ),
    "gaming": (
        "boss fights|speedruns|hidden levels|base builds|ranked matches|stealth missions|pixel platformers"
        "|racing games|farming sims|card decks",
        "A beginner's guide to {}|The funniest {} this month|Ranking my favourite {}|{} that broke the game"
        "|Late-night {} with viewers",
        "no commentary|on the hardest setting|chat decides|patch notes included|live highlights|in co-op mode"
        "|full walkthrough|pure chaos",
    ),
    "pets": (
        "golden retriever|orange cat|rescue puppy|talking parrot|tiny hamster|grumpy bulldog|ragdoll kitten"
        "|baby rabbit|noisy husky|old tortoise",
        "My {} meets the vet|Why the {} refuses to sleep|The {} that runs this house|Bath time for my {}"
        "|Teaching the {} a new trick",
        "sound on|wait for the ending|caught on camera|cuteness warning|filmed by accident|the neighbours heard it"
        "|treats were involved|first attempt",
    ),
    "travel": (
        "Lisbon|Kyoto|Patagonia|Istanbul|Marrakech|Iceland|Hanoi|the Dolomites|Cape Town|Oaxaca",
        "Three days in {}|What nobody tells you about {}|The quiet side of {}|Eating my way through {}"
        "|A budget guide to {}",
        "map included|without a car|in the off season|with two kids|by public transport|on a first trip"
        "|before sunrise|with a local friend",
    ),
    "music": (
        "acoustic guitar|jazz piano|lo-fi beats|street violin|choir harmonies|hand drums|bass grooves|synth pop"
        "|opera arias|folk songs",
        "{} in an empty station|Learning {} in one month|{} for late nights|My first year of {}|{} with a loop pedal",
        "one take|headphones recommended|live on the roof|sheet music included|with an unexpected guest"
        "|recorded on a phone|the crowd goes quiet|cover version",
    ),
    "dance": (
        "hip-hop|salsa|ballet|tango|popping|breakdance|K-pop dance|contemporary dance|tap dance|swing",
        "A {} combo for beginners|Learning {} at forty|{} battle in the park|Our {} crew rehearses|One minute of {}",
        "mirrored version|slow then full speed|in the rain|with the whole class|no mirrors|on the beach"
        "|counted out loud|filmed at midnight",
    ),
    "comedy": (
        "office meetings|family dinners|first dates|gym selfies|airport queues|group chats|online shopping"
        "|parallel parking|job interviews|moving day",
        "If we were honest about {}|My mother versus {}|{} as a nature documentary|Nobody is ready for {}"
        "|A short guide to {}",
        "stand-up clip|but it gets worse|live from the tour|with the whole cast|based on a true story"
        "|punchline at the end|told by a dog|the extended sketch",
    ),
    "fitness": (
        "push-ups|squats|planks|deadlifts|kettlebell swings|pull-ups|lunges|burpees|hip stretches|jump rope",
        "{} without mistakes|Thirty days of {}|A trainer corrects my {}|{} for absolute beginners"
        "|Why I do {} every morning",
        "no equipment|ten minutes a day|at home|follow along|with form cues|low impact|before breakfast"
        "|results included",
    ),
    "beauty": (
        "winged eyeliner|glass skin|curly hair|nail art|red lipstick|soft brows|braided updos|sunscreen"
        "|summer bronzer|night serum",
        "{} for busy mornings|My {} routine|{} mistakes to avoid|Testing {} tips for a week"
        "|A make-up artist explains {}",
        "under ten dollars|for sensitive skin|honest review|get ready with me|made to last all day|step by step"
        "|no filter|for mature skin",
    ),
    "fashion": (
        "linen shirts|vintage denim|wool coats|white sneakers|silk scarves|oversized blazers|rain boots"
        "|knit sweaters|summer dresses|leather bags",
        "Five ways to wear {}|Thrifting {}|How to care for {}|{} for every budget|Styling {} at work",
        "try-on haul|petite edition|capsule wardrobe|all second-hand|from day to night|for tall people"
        "|colour guide|worst to best",
    ),
    "technology": (
        "folding phones|mechanical keyboards|smart watches|noise-cancelling headphones|budget laptops|home robots"
        "|camera drones|e-ink readers|3D printers|electric scooters",
        "{} after one year|Do not buy {} yet|Taking apart {}|Comparing {} side by side|The future of {}",
        "honest review|battery test|with benchmarks|in four minutes|hidden settings|repair notes|long-term test"
        "|for students",
    ),
    "science": (
        "black holes|volcanoes|deep-sea creatures|antibiotics|gravitational waves|slime moulds|glaciers"
        "|solar flares|superconductors|migrating birds",
        "What we know about {}|Three myths about {}|The strange history of {}|A scientist answers questions on {}"
        "|{} explained with kitchen items",
        "for the curious|in two minutes|with animations|new findings|live from the lab|for kids and parents"
        "|no maths needed|sources included",
    ),
    "cars": (
        "electric hatchbacks|old pickups|rally cars|camper vans|motorcycles|sports coupes|diesel trucks"
        "|classic convertibles|go-karts|family wagons",
        "Restoring {}|Why people love {}|Cheap repairs for {}|A track day with {}|The sound of {}",
        "garage diary|before and after|no talking|under the hood|costs included|on gravel roads"
        "|first start in years|from the driver's seat",
    ),
    "home": (
        "small balconies|studio kitchens|bookshelves|bathroom tiles|attic rooms|wooden floors|hallway closets"
        "|bay windows|concrete walls|garden sheds",
        "Renovating {}|Smart ideas for {}|{} before and after|A weekend spent on {}|Lighting tricks for {}",
        "renter friendly|costs included|time lapse|no drill needed|tools listed|advice from a carpenter"
        "|second-hand only|mistakes included",
    ),
    "parenting": (
        "toddlers|newborns|first graders|twins|teenagers|picky eaters|shy kids|big siblings|early risers"
        "|little artists",
        "Calm mornings with {}|Long car rides with {}|What {} taught me|Rainy day games for {}|Dinner ideas for {}",
        "no screens|real talk|a father's view|in small flats|with free printables|advice from a nurse"
        "|tired but happy|what worked for us",
    ),
    "drama": (
        "The Silent Heiress|Midnight Contract|Second Spring|Letters to Nowhere|The Doctor's Secret|Neon Harbor"
        "|A House of Glass|My Rival's Brother|The Last Tram|Winter Promise",
        "{}: the wedding scene|{}: she finds the letter|{}: everyone knows now|{}: the rooftop confession"
        "|{}: he comes back",
        "episode recap|full scene|uncut|cliffhanger ending|fan edit|with subtitles|the cast reacts|best lines",
    ),
    "crafts": (
        "watercolour skies|clay mugs|paper cranes|felted animals|carved spoons|ink portraits|glass beads"
        "|patchwork quilts|street murals|pixel art",
        "{} from start to finish|Beginner mistakes with {}|A relaxing hour of {}|One tool for better {}"
        "|Making {} with my sister",
        "no talking|materials listed|under five dollars|time lapse|for a gift|with leftovers|real-time tutorial"
        "|studio visit",
    ),
    "gardening": (
        "cherry tomatoes|rose bushes|bonsai trees|potted herbs|strawberries|sunflowers|lemon trees|chilli plants"
        "|lavender|oyster mushrooms",
        "Growing {} indoors|Saving dying {}|When to water {}|The first harvest of {}|{} from scratch",
        "week by week|on a balcony|no chemicals|in cold climates|common mistakes|in recycled pots"
        "|advice from a farmer|time lapse",
    ),
    "outdoors": (
        "mountain huts|trout fishing|ice climbing|night hikes|river kayaking|trail running|wild camping|bird watching"
        "|desert treks|cave tours",
        "A weekend of {}|What to pack for {}|{} gone wrong|Beginner's notes on {}|Solo trip: {}",
        "in bad weather|gear list|no talking|with my dog|above the clouds|first-person view|safety tips|at dawn",
    ),
}

CATEGORIES = tuple(_WORDS)
SUBJECTS = tuple(tuple(words[0].split("|")) for words in _WORDS.values())
_TEMPLATES = tuple(tuple(words[1].split("|")) for words in _WORDS.values())
_DETAILS = tuple(tuple(words[2].split("|")) for words in _WORDS.values())
NUM_SUBJECTS = len(SUBJECTS[0])


def make_titles(category: np.ndarray, subject: np.ndarray, rng: np.random.Generator) -> list[str]:
    """
    Draw a title for each item; after the 40 forms of a subject, series begin ("..., part 2").

    Args:
        category (`np.ndarray` of shape `(num_items,)`): row in `CATEGORIES`.
        subject (`np.ndarray` of shape `(num_items,)`): row in `SUBJECTS[category]`.
        rng (`np.random.Generator`): order of the templates and details.

    Returns:
        `list[str]`: N titles, all different.
    """
    num_forms = len(_TEMPLATES[0]) * len(_DETAILS[0])
    forms = rng.permuted(np.tile(np.arange(num_forms), (len(CATEGORIES), NUM_SUBJECTS, 1)), axis=2)
    titles: list[str] = []
    used: dict[tuple[int, int], int] = {}
    for c, s in zip(category.tolist(), subject.tolist()):
        number = used.get((c, s), 0)
        used[c, s] = number + 1
        template, detail = divmod(int(forms[c, s, number % num_forms]), len(_DETAILS[0]))
        title = f"{_TEMPLATES[c][template].format(SUBJECTS[c][s])}, {_DETAILS[c][detail]}"
        part = f", part {number // num_forms + 1}" if number >= num_forms else ""
        titles.append(title[0].upper() + title[1:] + part)
    return titles
